"""Opening models by place and by name, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaConfig, OPTConfig

from flexgen.demo import MODEL_DIR
from flexgen.errors import CheckpointError, ModelError
from flexgen.models import build_layers, open_model
from flexgen.models.bin_files import BinCheckpoint
from flexgen.models.tensor_files import SafetensorsCheckpoint


def _edit(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_directory_by_text_and_by_path(make_model, save):
    directory = save(make_model("opt"))
    for model in (directory, str(directory)):
        spec, checkpoint = open_model(model)
        assert spec.name == str(directory)
        assert checkpoint.directory == directory
        assert isinstance(checkpoint, SafetensorsCheckpoint)


def test_generation_config_decides_the_stop_ids(make_model, save):
    directory = save(make_model("llama", eos_token_id=2))
    assert open_model(directory)[0].eos_token_ids == (2,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    assert open_model(directory)[0].eos_token_ids == (9, 11)
    assert open_model(directory, "dummy")[0].eos_token_ids == (9, 11)
    (directory / "generation_config.json").write_text("{}")
    assert open_model(directory)[0].eos_token_ids == (2,)


def test_the_files_tell_the_dtype_where_the_config_does_not(make_model, save):
    directory = save(make_model("opt", dtype=torch.bfloat16))
    assert open_model(directory)[0].dtype == torch.bfloat16
    _edit(directory / "config.json", dtype=None)
    assert open_model(directory)[0].dtype == torch.bfloat16
    assert open_model(directory, "dummy")[0].dtype == torch.float32


def test_the_old_name_of_dtype(make_model, save):
    directory = save(make_model("opt"))
    _edit(directory / "config.json", dtype=None, torch_dtype="float16")
    assert open_model(directory)[0].dtype == torch.float16


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_head_called_tied_that_has_values_of_its_own_counts(format, make_model, save):
    directory = save(make_model("llama"), format)
    _edit(directory / "config.json", tie_word_embeddings=True)
    spec, _ = open_model(directory)
    assert not spec.tied_head


def test_a_tied_head_is_the_embedding(make_model, save):
    spec, checkpoint = open_model(save(make_model("opt")))
    embed, *_, head = build_layers(spec)
    (table,) = [w for w in embed.weights if w.name == "embed.weight"]
    (out,) = [w for w in head.weights if w.name == "head.weight"]
    assert spec.tied_head
    assert (table.key, table.sources) == (out.key, out.sources)
    assert checkpoint.extent(table) == checkpoint.extent(out)


def test_dummy_never_looks_at_weights(make_model, save):
    directory = save(make_model("opt"))
    (directory / "model.safetensors").unlink()
    spec, checkpoint = open_model(directory, "dummy")
    assert checkpoint.directory == directory
    checkpoint.verify(build_layers(spec))


def test_a_config_object():
    spec, checkpoint = open_model(OPTConfig(num_hidden_layers=3), "dummy")
    assert (spec.name, spec.num_layers, checkpoint.directory) == ("opt", 3, None)
    with pytest.raises(ModelError, match="config has no weights.*weights='dummy'"):
        open_model(LlamaConfig())


def test_errors_of_place(tmp_path, make_model, save):
    for missing in (tmp_path / "none", "./none", "/none/at/all", "~/none/at/all"):
        with pytest.raises(ModelError, match="there is no such directory"):
            open_model(missing)
    with pytest.raises(ModelError, match="no config.json in this directory"):
        open_model(tmp_path)
    directory = save(make_model("opt"))
    with pytest.raises(ModelError, match="is a file; give the directory"):
        open_model(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    with pytest.raises(CheckpointError, match=f"no weight files; looked for {names}"):
        open_model(directory)
    with pytest.raises(
        ModelError, match="weights = 'random' is not supported; supported: 'checkpoint', 'dummy'"
    ):
        open_model(directory, "random")
    with pytest.raises(ModelError, match="model is a int"):
        open_model(7)


def test_errors_of_config(make_model, save):
    config = save(make_model("opt")) / "config.json"
    _edit(config, hidden_size="wide")
    with pytest.raises(ModelError, match="hidden_size = .wide. is not a size"):
        open_model(config.parent)
    _edit(config, model_type="mamba")
    with pytest.raises(
        ModelError, match="model_type = 'mamba' is not supported; supported: afmoe, arcee, .*, llama"
    ):
        open_model(config.parent)
    config.write_text("[]")
    with pytest.raises(ModelError, match="contains a list; expected an object"):
        open_model(config.parent)
    config.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        open_model(config.parent)


def test_an_index_with_missing_files(make_model, save):
    directory = save(make_model("opt"), max_shard_size="10KB")
    gone = sorted(directory.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"index.json are missing: {gone.name}"):
        open_model(directory)


class _Hub:
    """Serves the files of one directory whose names match the patterns asked for."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.asked: list[str] = []
        target.mkdir()

    def snapshot(self, repository, allow_patterns, ignore_patterns=(), dry_run=False):
        if dry_run:  # lists the files
            return []
        self.asked.append(repository)
        for file in self.source.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, self.target)
        return str(self.target)

    def file(self, repository, filename):
        self.asked.append(f"{repository}/{filename}")
        return shutil.copy(self.source / filename, self.target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def serve(source):
        served = _Hub(source, tmp_path / "snapshot")
        monkeypatch.setattr("huggingface_hub.snapshot_download", served.snapshot)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", served.file)
        return served

    return serve


@pytest.mark.parametrize(
    ("format", "asked", "kind"), [("safetensors", 1, SafetensorsCheckpoint), ("bin", 2, BinCheckpoint)]
)
def test_a_hub_id_downloads_one_format_of_weights(format, asked, kind, make_model, save, hub):
    served = hub(save(make_model("opt"), format))
    (served.source / "flax_model.msgpack").write_text("other")
    spec, checkpoint = open_model("someone/model")
    assert (spec.name, served.asked) == ("someone/model", ["someone/model"] * asked)
    assert isinstance(checkpoint, kind)
    assert not (served.target / "flax_model.msgpack").exists()
    checkpoint.verify(build_layers(spec))


def test_dummy_weights_of_a_hub_id_fetch_the_config_alone(make_model, save, hub):
    served = hub(save(make_model("opt")))
    open_model("someone/model", "dummy")
    assert served.asked == ["someone/model/config.json"]


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "tokenizer.model", "spiece.model", "qwen.tiktoken", "tekken.json", "vocab.json"],
)
def test_all_kinds_of_tokenizers_are_downloaded(file, make_model, save, hub):
    directory = save(make_model("opt"))
    (directory / file).write_text("{}")
    served = hub(directory)
    open_model("someone/mine")
    assert (served.target / file).exists()


def test_a_known_name_with_weights_is_a_hub_id(make_model, save, hub):
    served = hub(save(make_model("opt")))
    open_model("opt-30b")
    assert served.asked == ["facebook/opt-30b"]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(*args, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ModelError, match="someone/model: not a local directory, and the hub cannot be reached"
    ):
        open_model("someone/model")


@pytest.mark.skipif(not MODEL_DIR.is_dir(), reason="the embedded model is not in this tree")
def test_the_embedded_model_opens_and_verifies():
    spec, checkpoint = open_model("demo")
    assert (spec.name, checkpoint.directory) == ("demo", MODEL_DIR)
    checkpoint.verify(build_layers(spec))


@pytest.mark.parametrize(
    ("name", "meant"), [("dmo", "demo"), ("opt-126m", "opt-125m"), ("facebook/opt-31b", "opt-30b")]
)
@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), OSError("no")])
def test_a_name_that_is_like_a_known_one_gets_a_hint(name, meant, error, monkeypatch):
    def ask(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    with pytest.raises(ModelError, match=rf"\(did you mean '{meant}'\?\)"):
        open_model(name)


@pytest.mark.parametrize("name", ["x" * 1000, "a/" + "x" * 1000, "/" + "x" * 1000])
def test_a_name_that_is_longer_than_a_file_may_have(name, monkeypatch):
    def ask(*args, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    with pytest.raises(ModelError, match="there is no such directory|not a local directory"):
        open_model(name)


@pytest.mark.parametrize("name", ["x" * 100_000, "a\nb" * 40_000])
def test_a_hub_id_of_any_length_makes_a_short_message(name: str) -> None:
    with pytest.raises(ModelError, match="neither a local directory nor a hub id") as raised:
        open_model(name)
    assert len(str(raised.value)) < 1000
