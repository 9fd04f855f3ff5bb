"""The formats of quantized checkpoints, compared with their documented layouts, and their settings."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import FORMATS, mxfp4, save_quantized, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexgen.errors import CheckpointError, ModelError
from flexgen.formats import METHODS, Encoding, read_encodings
from flexgen.models import build_layers, open_model

SAMPLES = Path(__file__).with_name("library_samples.safetensors")
SHAPES = [(8, 32), (24, 96), (136, 160), (264, 384)]


def encoding_of(config: dict[str, Any]) -> Encoding:
    (encoding,) = read_encodings(config, "mine", "quantization_config")
    return encoding


def in_order(encoding: Encoding, tensors: dict[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
    """The tensors that the encoding names, in their shapes and dtypes."""
    parts = encoding.parts(shape)
    assert (parts[0].suffix, parts[0].dtypes) == (encoding.mark[0], (encoding.mark[1],))
    found = [tensors[part.suffix].reshape(part.shape) for part in parts]
    assert all(tensor.dtype in part.dtypes for tensor, part in zip(found, parts, strict=True))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("compiled", [False, True])
def test_values(compiled: bool, form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernel, if there is one; and in torch, whole, and in pieces of a few rows."""
    if not compiled:
        monkeypatch.setattr("flexgen.kernels.encoded_linear.announce", lambda: False)
    torch.manual_seed(0)
    tensors, expected = FORMATS[form].round(torch.randn(shape))
    encoding = encoding_of(FORMATS[form].config)
    parts = in_order(encoding, tensors, shape)
    for piece in (1 << 19, 1, 3 * shape[1]):
        monkeypatch.setattr("flexgen.formats.encoding._PIECE", piece)
        out = torch.full(shape, torch.nan)
        encoding.decode(parts, out)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
    half = torch.empty(shape, dtype=torch.bfloat16)
    encoding.decode(parts, half)
    assert torch.equal(half, out.bfloat16())


def test_mxfp4_with_a_dimension_for_groups() -> None:
    torch.manual_seed(0)
    tensors, expected = mxfp4("_blocks", "_scales", by_group=True)(torch.randn(24, 96))
    encoding, out = encoding_of(dict(quant_method="mxfp4")), torch.empty(24, 96)
    encoding.decode(in_order(encoding, tensors, (24, 96)), out)
    assert torch.equal(out, expected)
    assert encoding.parts((24, 96))[0].shape == (24, 3, 16)


def test_known_values() -> None:
    """Bytes and their values, from the formats' specifications."""
    encoding, out = encoding_of(dict(quant_method="mxfp4")), torch.empty(1, 32)
    codes = torch.zeros(1, 1, 16, dtype=torch.uint8)
    codes[0, 0, :4] = torch.tensor([0x21, 0x7F, 0x98, 0x43])  # the low bits are first
    encoding.decode([codes, torch.tensor([[128]], dtype=torch.uint8)], out)
    assert out[0, :8].tolist() == [1.0, 2.0, -12.0, 12.0, -0.0, -1.0, 3.0, 4.0]

    gptq = encoding_of(dict(quant_method="gptq", bits=4, group_size=8))
    words = torch.tensor([[0x76543210] + [0] * 7], dtype=torch.int32)
    zeros = torch.tensor([[0x77777777]], dtype=torch.int32)  # 7 is stored for a zero point of 8
    out = torch.empty(8, 8)
    gptq.decode([words, torch.full((1, 8), 0.5), zeros], out)
    assert out[0].tolist() == [(code - 8) / 2 for code in range(8)]

    awq = encoding_of(dict(quant_method="awq", bits=4, group_size=8, zero_point=True))
    words = torch.tensor([[0x75316420]] + [[0]] * 7, dtype=torch.int32)  # columns 0, 2, 4, 6, 1, 3, 5, 7
    awq.decode([words, torch.full((1, 8), 0.5), torch.zeros(1, 1, dtype=torch.int32)], out)
    assert out[:, 0].tolist() == [code / 2 for code in range(8)]


with safe_open(SAMPLES, "pt") as file:
    WRITTEN: dict[str, str] = file.metadata()
"""The samples of `write_library_samples.py`, with their settings as JSON."""


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("compiled", [False, True])
def test_matrices_that_their_libraries_wrote(
    compiled: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors and gptqmodel wrote the tensors, and decoded them to the values."""
    if not compiled:
        monkeypatch.setattr("flexgen.kernels.encoded_linear.announce", lambda: False)
    tensors = {
        key.removeprefix(f"{name}/"): tensor
        for key, tensor in load_file(SAMPLES).items()
        if key.startswith(f"{name}/")
    }
    expected = tensors.pop("values")
    encoding, out = encoding_of(json.loads(WRITTEN[name])["config"]), torch.empty_like(expected)
    encoding.decode(in_order(encoding, tensors, (expected.shape[0], expected.shape[1])), out)
    assert expected.unique().numel() > 10
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_encodings_are_plain_data(form: str) -> None:
    encoding = encoding_of(FORMATS[form].config)
    again = pickle.loads(pickle.dumps(encoding))
    assert again == encoding
    assert hash(again) == hash(encoding)


PACKED = FORMATS["int4 pack"].config


def changed(**weights: Any) -> dict[str, Any]:
    group = PACKED["config_groups"]["group_0"]
    return PACKED | dict(config_groups=dict(group_0=group | dict(weights=group["weights"] | weights)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FORMATS["gptq"].config | dict(desc_act=True), "desc_act = True.*desc_act=False"),
        (FORMATS["gptq"].config | dict(bits=3), "bits = 3 is not supported; supported: 4, 8"),
        (FORMATS["gptq"].config | dict(group_size="128"), "group_size = '128' is not a size"),
        (FORMATS["gptq"].config | dict(checkpoint_format="marlin"), "checkpoint_format = 'marlin'"),
        (FORMATS["awq"].config | dict(version="gemv"), "version = 'gemv'.*'gemm'"),
        (FORMATS["awq"].config | dict(zero_point="no"), "zero_point = 'no'"),
        (FORMATS["fp8 in blocks"].config | dict(weight_block_size=[128]), r"weight_block_size = \[128\].*two sizes"),
        (FORMATS["fp8 in blocks"].config | dict(fmt="e5m2"), "fmt = 'e5m2'"),
        (FORMATS["modelopt fp8"].config | dict(quant_algo="W4A8_AWQ"), "quant_algo = 'W4A8_AWQ'"),
        (PACKED | dict(format="marlin-24"), "format = 'marlin-24'.*pack-quantized"),
        (PACKED | dict(config_groups={}), "config_groups is empty"),
        (PACKED | dict(config_groups=3), "config_groups = 3.*expected an object"),
        (changed(actorder="group"), "config_groups: group_0: weights: actorder = 'group'"),
        (changed(num_bits=2), "num_bits = 2"),
        (changed(group_size=0), "group_size = 0 is not a size"),
        (changed(strategy="tensor"), "strategy = 'tensor'"),
    ],
)  # fmt: skip
def test_settings_that_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"mine: quantization_config.*{message}"):
        read_encodings(config, "mine", "quantization_config")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [None, 3, [], "x", {"a": 1}])
def test_no_value_ends_in_another_error(method: str, value: Any) -> None:
    for form in FORMATS.values():
        for field in form.config:
            try:
                read_encodings(form.config | {field: value, "quant_method": method}, "mine", "field")
            except ModelError as error:
                assert "mine: field" in str(error)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("fp8 in blocks", {".weight_scale_inv": None}, "weight_scale_inv is missing"),
        ("fp8 in blocks", {".weight_scale_inv": torch.ones(2, 2)}, r"weight_scale_inv is F32 \(2, 2\).*\(3, 3\)"),
        ("gptq", {".scales": None}, "scales is missing"),
        ("gptq", {".qzeros": torch.zeros(2, 8, dtype=torch.int32)}, r"qzeros is I32 \(2, 8\).*int32 \(4, 8\)"),
        ("awq", {".scales": torch.ones(2, 64, dtype=torch.float64)}, r"scales is F64.*float32 or bfloat16"),
        ("int4 pack", {".weight_packed": torch.ones(64, 7, dtype=torch.int32)}, r"weight_packed is I32 \(64, 7\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    form: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    save_quantized(tiny("qwen3"), FORMATS[form], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for suffix, tensor in change.items():
        name = f"model.layers.1.self_attn.q_proj{suffix}"
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"layers.1.self_attn.q_proj.weight is stored in .*{message}"):
        open_model(tmp_path)


def test_groups_that_do_not_divide_a_row(tmp_path: Path) -> None:
    save_quantized(tiny("qwen3"), FORMATS["gptq"], tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = 48
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="64 values, which groups of 48 do not divide: use a"):
        open_model(tmp_path)


@pytest.mark.parametrize("form", ["fp8 in blocks", "awq", "mxfp4 pack"])
def test_values_that_are_not_finite(form: str, tmp_path: Path) -> None:
    save_quantized(tiny("qwen3"), FORMATS[form], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj"
    if form == "awq":
        tensors[f"{name}.scales"][1, 3] = torch.inf
    elif form == "mxfp4 pack":
        tensors[f"{name}.weight_scale"][5, 1] = 255
    else:
        tensors[f"{name}.weight"].view(torch.uint8)[5, 7] = 0xFF
    save_file(tensors, path)
    spec, files = open_model(tmp_path)
    (weight,) = [w for layer in build_layers(spec) for w in layer.weights if w.key == f"{name}.weight"]
    with pytest.raises(CheckpointError, match="q_proj.* contains NaN or infinite values"):
        files.read(weight, torch.float32)


def test_values_outside_the_range_of_the_dtype(tmp_path: Path) -> None:
    save_quantized(tiny("qwen3"), FORMATS["fp8, one scale"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"].fill_(1e4)
    save_file(tensors, path)
    spec, files = open_model(tmp_path)
    (weight,) = [w for layer in build_layers(spec) for w in layer.weights if "1.self_attn.q_proj" in w.key]
    with pytest.raises(CheckpointError, match="outside the range of float16.*bfloat16"):
        files.read(weight, torch.float16)
    assert files.read(weight, torch.bfloat16).isfinite().all()
