"""Folders without a model, and wrong index files."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from flexgen.errors import CheckpointError, ModelError
from flexgen.models import build_layers, open_model
from flexgen.models.folders import check_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_weights_that_are_no_files(format, make_model, save):
    directory = save(make_model("opt"), format)
    path = directory / ("model.safetensors" if format == "safetensors" else "pytorch_model.bin")
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{path.name} is a Git LFS pointer.*git lfs pull"):
        open_model(directory)
    path.unlink()
    path.symlink_to("../blobs/gone")
    with pytest.raises(
        CheckpointError, match=f"{path.name} is a link to ../blobs/gone, which does not exist"
    ):
        open_model(directory)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{path.name} is a FIFO"):
        open_model(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_file(name, make_model, save):
    directory = save(make_model("opt"))
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
        open_model(directory)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside.safetensors",
        "a/../../b",
        "",
        ".",
        "..",
        "a\0b",
        5,
        None,
        ["a"],
        {"a": "b"},
        1e400,
    ],
    ids=repr,
)
def test_names_that_an_index_must_not_have(name, make_model, save):
    directory = save(make_model("opt"), max_shard_size="10KB")
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["extra"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="weight_map contains .*expected the name of a file"):
        open_model(directory)


def test_files_that_an_index_names_and_are_none(make_model, save):
    directory = save(make_model("opt"), max_shard_size="10KB")
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} is a FIFO"):
        open_model(directory)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(CheckpointError, match=f"{shard.name} is a directory"):
        open_model(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none(text, make_model, save):
    directory = save(make_model("opt"), max_shard_size="10KB")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_model(directory)


def test_links_into_a_cache_are_followed(make_model, save, tmp_path):
    directory = save(make_model("opt"), max_shard_size="10KB")
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    spec, checkpoint = open_model(snapshot)
    checkpoint.verify(build_layers(spec))
    with pytest.raises(ModelError, match=rf"entry of the hub's cache.*id, 'a/b', or .*{snapshot}"):
        open_model(tmp_path / "models--a--b")


def test_an_adapter_alone_is_refused(tmp_path):
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text('{"base_model_name_or_path": "someone/base"}')
    with pytest.raises(ModelError, match=r"LoRA adapter for 'someone/base', not a model.*merge_and_unload"):
        open_model(tmp_path)
    for text in ("[", "[]", "{}", '{"base_model_name_or_path": 5}'):
        adapter.write_text(text)
        with pytest.raises(ModelError, match="contains a LoRA adapter, not a model"):
            check_folder(tmp_path, "config.json")


def test_an_adapter_next_to_a_model_is_not_applied_and_says_so(make_model, save, caplog):
    directory = save(make_model("opt"))
    open_model(directory)
    assert not caplog.messages
    (directory / "adapter_config.json").write_text("{}")
    open_model(directory)
    (message,) = caplog.messages
    assert "LoRA adapter (adapter_config.json), which is not applied" in message


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_that_two_shards_have(format, indexed, make_model, save):
    """A second download of other shards into the same directory, whether or not the index names the copy's shard."""
    options = {"max_shard_size": "10KB"} if format == "safetensors" else {"shards": 2}
    directory = save(make_model("opt"), format, **options)
    (index,) = directory.glob("*.index.json")
    values = json.loads(index.read_text())
    name, shard = next(iter(values["weight_map"].items()))
    shutil.copy(directory / shard, directory / f"other-{shard}")
    values["weight_map"] |= {name: f"other-{shard}"} if indexed else {"extra": f"other-{shard}"}
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"is both in .* and in .*two checkpoints are mixed"):
        open_model(directory)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("consolidated.00.pth", r"is in Meta's own layout.*convert_llama_weights_to_hf"),
        ("tf_model.h5", "is in TensorFlow's format.*save_pretrained"),
    ],
)
def test_weights_of_another_program(file, words, make_model, save, tmp_path):
    directory = tmp_path / "other"
    directory.mkdir()
    (directory / file).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=f"no config.json in this directory.*{words}"):
        open_model(directory)
    with pytest.raises(ModelError, match=f"is a file; .*{words}"):
        open_model(directory / file)
    shutil.copy(save(make_model("opt")) / "config.json", directory)
    with pytest.raises(CheckpointError, match=f"no weight files; .*{words}"):
        open_model(directory)
