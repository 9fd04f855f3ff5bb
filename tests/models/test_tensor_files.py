"""Tensors in files: extents, reads, shards, and every kind of damage."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexgen.errors import CheckpointError
from flexgen.models import build_layers, open_model
from flexgen.models.bin_files import BinCheckpoint
from flexgen.models.headers import StoredTensor, read_header
from flexgen.models.tensor_files import SafetensorsCheckpoint


def _all_weights(spec):
    return [weight for layer in build_layers(spec) for weight in layer.weights]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extents_read_back_by_plain_file_reads(dtype, options, make_model, save):
    model = make_model("opt", dtype=dtype)
    directory = save(model, **options)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == bool(options)
    spec, checkpoint = open_model(directory)
    checkpoint.verify(build_layers(spec))
    tensors = model.state_dict()
    for weight in _all_weights(spec):
        extent = checkpoint.extent(weight)
        with extent.path.open("rb") as file:
            file.seek(extent.offset)
            data = bytearray(file.read(extent.nbytes))
        found = torch.frombuffer(data, dtype=extent.dtype).view(extent.shape)
        assert torch.equal(found, tensors[weight.key])
        assert extent.nbytes == weight.nbytes(dtype)
        assert torch.equal(checkpoint.read(weight, dtype), found)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(shards, legacy, make_model, save):
    model = make_model("llama")
    options = {"_use_new_zipfile_serialization": False} if legacy and shards == 1 else {}
    spec, checkpoint = open_model(save(model, "bin", shards, **options))
    assert isinstance(checkpoint, BinCheckpoint)
    checkpoint.verify(build_layers(spec))
    for weight in _all_weights(spec):
        assert checkpoint.extent(weight) is None
        read = checkpoint.read(weight, torch.float32)
        assert torch.equal(read, model.state_dict()[weight.key])
        read.zero_()
        assert checkpoint.read(weight, torch.float32).any(), "a read is a tensor of its own"


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_some_rows_are_read_as_they_stand_in_the_whole(format, make_model, save):
    spec, checkpoint = open_model(save(make_model("opt"), format))
    for weight in _all_weights(spec):
        whole = checkpoint.read(weight, torch.bfloat16)
        for rows in (range(1, 4), range(weight.shape[0] - 1, weight.shape[0]), range(weight.shape[0])):
            some = checkpoint.read(weight, torch.bfloat16, rows)
            assert some.is_contiguous() and torch.equal(some, whole[rows.start : rows.stop])


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_reads_convert(format, make_model, save):
    model = make_model("opt")
    spec, checkpoint = open_model(save(model, format))
    assert spec.tied_head, "two equal copies in a file are one tensor"
    for weight in _all_weights(spec):
        read = checkpoint.read(weight, torch.bfloat16)
        assert read.is_contiguous()
        assert torch.equal(read, model.state_dict()[weight.key].bfloat16())


@pytest.mark.parametrize(("family", "prefix"), [("opt", "model."), ("llama", "model.")])
def test_names_of_a_bare_decoder(family, prefix, make_model, save):
    model = make_model(family, tie_word_embeddings=True)
    directory = save(model)
    path = directory / "model.safetensors"
    save_file({name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}, path)
    spec, checkpoint = open_model(directory)
    checkpoint.verify(build_layers(spec))
    for weight in _all_weights(spec):
        assert torch.equal(checkpoint.read(weight, torch.float32), model.state_dict()[weight.key])


def test_headers_count_and_not_the_index(make_model, save):
    directory = save(make_model("opt"), max_shard_size="10KB")
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    files = sorted(set(values["weight_map"].values()))
    values["weight_map"] = {f"nonsense.{i}": file for i, file in enumerate(files)}
    index.write_text(json.dumps(values))
    spec, checkpoint = open_model(directory)
    checkpoint.verify(build_layers(spec))


def _rewrite(directory, format, change):
    path = directory / ("model.safetensors" if format == "safetensors" else "pytorch_model.bin")
    tensors = load_file(path) if format == "safetensors" else torch.load(path)
    change(tensors)
    save_file(tensors, path) if format == "safetensors" else torch.save(tensors, path)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_missing_tensors_and_wrong_shapes_and_dtypes_are_named(format, make_model, save):
    fc1, fc2 = (f"model.decoder.layers.1.{name}.weight" for name in ("fc1", "fc2"))
    directory = save(make_model("opt"), format)
    spec, _ = open_model(directory)
    layers = build_layers(spec)

    _rewrite(directory, format, lambda tensors: tensors.update({fc1: tensors[fc1].long()}))
    with pytest.raises(CheckpointError, match=rf"{fc1} has dtype .*64, which is not supported; supported: "):
        open_model(directory)[1].verify(layers)
    _rewrite(directory, format, lambda tensors: tensors.update({fc1: torch.zeros(3, 32)}))
    with pytest.raises(
        CheckpointError, match=rf"1 tensor of the wrong shape: {fc1}: found \(3, 32\), expected \(48, 32\)"
    ):
        open_model(directory)[1].verify(layers)
    _rewrite(directory, format, lambda tensors: (tensors.pop(fc1), tensors.pop(fc2)))
    with pytest.raises(CheckpointError, match=f"2 tensors missing: {fc1}; {fc2}"):
        open_model(directory)[1].verify(layers)
    (missing,) = [weight for weight in _all_weights(spec) if weight.key == fc1]
    with pytest.raises(
        CheckpointError, match=f"tensor is missing; looked for {fc1} and decoder.layers.1.fc1.weight"
    ):
        open_model(directory)[1].read(missing, torch.float32)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(value, format, make_model, save):
    directory, name = save(make_model("opt"), format), "model.decoder.layers.1.fc1.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    _rewrite(directory, format, spoil)
    spec, checkpoint = open_model(directory)
    checkpoint.verify(build_layers(spec))
    for weight in _all_weights(spec):
        if weight.key != name:
            checkpoint.read(weight, torch.float16)
            continue
        assert checkpoint.read(weight, torch.float32, range(3)).isfinite().all()
        for rows in (None, range(3, 4)):
            with pytest.raises(CheckpointError, match=f"{name} contains NaN or infinite values"):
                checkpoint.read(weight, torch.float32, rows)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_values_that_exceed_the_dtype_say_which_dtype_helps(format, make_model, save):
    directory, name = save(make_model("opt"), format), "model.decoder.layers.1.fc1.weight"

    def enlarge(tensors):
        tensors[name][3, 5] = 7e4

    _rewrite(directory, format, enlarge)
    spec, checkpoint = open_model(directory)
    (weight,) = [weight for weight in _all_weights(spec) if weight.key == name]
    assert checkpoint.read(weight, torch.bfloat16).isfinite().all()
    with pytest.raises(
        CheckpointError, match=f"{name} has values outside the range of float16: .*'bfloat16'"
    ):
        checkpoint.read(weight, torch.float16)


def test_many_missing_tensors_are_counted(make_model, save):
    directory = save(make_model("opt"))
    layers = build_layers(open_model(directory)[0])
    _rewrite(directory, "safetensors", lambda tensors: [tensors.pop(name) for name in list(tensors)[2:]])
    with pytest.raises(CheckpointError, match="tensors missing: .*; and [0-9]+ more"):
        open_model(directory)[1].verify(layers)


@pytest.mark.parametrize("keep", [0, 4, 8, 500, -1])
def test_a_truncated_file_is_refused_when_it_is_opened(keep, make_model, save):
    directory = save(make_model("opt"))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file|truncated or damaged"):
        open_model(directory)


def _safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "header cannot be read"),
        (b"[1, 2]", "header cannot be read"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "header cannot be read"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "of shape .2,. in F32 cannot have 4 bytes",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, "truncated or damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "truncated or damaged"),
        *(
            ({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, "header cannot be read")
            for shape, offsets in (
                ([1], [0, 4.0]),
                ([1], ["0", "4"]),
                ([1], [0, math.inf]),
                ([1], [0, math.nan]),
                ([1], [False, 4]),
                ([1], [0, 4, 8]),
                ([1], [0, 10**30]),
                ([1], "04"),
                ([1], None),
                ([1.0], [0, 4]),
                (["1"], [0, 4]),
                ("1", [0, 4]),
                ([math.inf], [0, 4]),
                ([[1]], [0, 4]),
                ([10**30], [0, 4]),
            )
        ),
        (b"[" * 100_000, "header cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}', "header cannot be read"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + b"9" * 5000 + b"]}}",
            "cannot be read",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            "a name is duplicated",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
            },
            "a and b overlap at byte",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]},
            },
            "a and b overlap at byte",
        ),
        ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, "cannot be read"),
    ],
)
def test_a_damaged_header_is_refused(header, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_header(_safetensors(tmp_path / "x.safetensors", header, bytes(8)))


def test_the_published_example_of_the_format(tmp_path):
    header = {"__metadata__": {"by": "hand"}, "a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [2, 6]}}
    path = _safetensors(tmp_path / "x.safetensors", header, bytes(6))
    offset = path.stat().st_size - 4
    assert read_header(path) == {"a": StoredTensor(path, "BF16", torch.bfloat16, (1, 2), offset, 4)}


def test_a_file_that_shrinks_after_it_was_opened(make_model, save):
    directory = save(make_model("opt"))
    spec, checkpoint = open_model(directory)
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    last = max(_all_weights(spec), key=lambda weight: checkpoint.extent(weight).offset)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"the file ends within {last.key}"):
        checkpoint.read(last, torch.float32)


class _Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("content", ["pickle", "list", "text"])
def test_a_bin_file_that_is_no_checkpoint(content, make_model, save, capsys):
    directory = save(make_model("opt"), "bin")
    path = directory / "pytorch_model.bin"
    if content == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    else:
        torch.save({"a": _Evil()} if content == "pickle" else [1], path)
    message = r"pytorch_model.bin(: cannot be read|: contains a list| is a Git LFS pointer)"
    with pytest.raises(CheckpointError, match=message) as raised:
        open_model(directory)
    assert "weights_only" not in str(raised.value)
    assert "code of the file ran" not in capsys.readouterr().out


KINDS = {"safetensors": {}, "bin": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def _fingerprint(directory):
    return open_model(directory)[1].fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_is_of_the_content_and_not_of_its_files(kind, make_model, save, tmp_path):
    directory = save(make_model("opt"), "safetensors" if kind == "safetensors" else "bin", **KINDS[kind])
    before, identity = _fingerprint(directory), open_model(directory)[1].identity
    for path in directory.iterdir():
        path.chmod(0o600)
        os.link(path, tmp_path / path.name)
        os.utime(path, (0, 0))
    assert open_model(directory)[1].identity != identity
    assert _fingerprint(directory) == before
    assert (
        _fingerprint(shutil.copytree(directory, tmp_path / "copy", copy_function=shutil.copyfile)) == before
    )


def test_a_fingerprint_does_not_depend_on_shards(make_model, save, tmp_path):
    model = make_model("opt")
    before = _fingerprint(save(model))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert _fingerprint(tmp_path / "sharded") == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_differs_after_training(kind, make_model, save):
    format = "safetensors" if kind == "safetensors" else "bin"
    found = set()
    for change in (None, "embed_tokens.weight", "layers.1.fc1.bias"):
        model = make_model("opt")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if change is not None and name.endswith(change):
                    parameter.mul_(1.01)
        found.add(_fingerprint(save(model, format, **KINDS[kind])))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", torch.int32, "GPTQ or AWQ"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", torch.uint8, "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.SCB", torch.float32, "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.float32, "fp8"),
        ("model.layers.0.self_attn.q_proj.weight", torch.float8_e4m3fn, "fp8"),
    ],
)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_quantized_weights_whose_config_does_not_say_so(name, dtype, method, format, make_model, save):
    model = make_model("llama")
    directory = save(model, format)
    tensors = dict(model.state_dict()) | {name: torch.zeros(8, 8).to(dtype)}
    if format == "safetensors":
        save_file(tensors, directory / "model.safetensors")
    else:
        torch.save(tensors, directory / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=rf"quantized weights \({method}\), but config.json has no quantization_config.*float16",
    ):
        open_model(directory)


def test_a_bin_file_whose_archive_is_damaged(make_model, save):
    """The end of the archive, by which it is recognized, is whole; its list of files is not."""
    path = save(make_model("opt"), "bin") / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    begin = data.rfind(b"PK\x01\x02")
    data[begin : begin + 4] = bytes(4)
    path.write_bytes(data)
    assert zipfile.is_zipfile(path)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(path)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: cannot be read as a checkpoint of tensors"):
        open_model(path.parent)
