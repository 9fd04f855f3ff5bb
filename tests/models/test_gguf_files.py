"""Quantized types of GGUF files against the decoded model, files that are damaged, and folders."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import FILES, Tiny, tiny, write_gguf

from flexgen.errors import CheckpointError, ModelError
from flexgen.models import build_layers, open_model
from flexgen.models.gguf_files import DECODED, GGUFCheckpoint

WIDE = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)
"""Sizes that fit blocks of 256 values."""
IDS = torch.randint(4, 60, (3, 14), generator=torch.Generator().manual_seed(1))


def _random_blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Blocks of a K type with random values around 0, because the package has no encoder for them."""
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (int(np.prod(shape)) // block, nbytes), dtype=np.uint8)
    # The float16 scales of each type: the one of the values, and the one of the minimums.
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for place in places:
        blocks[:, place : place + 2] = np.full((len(blocks), 1), 1e-4, dtype=np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", DECODED)
def test_logits_equal_those_of_the_decoded_model(kind: str, tmp_path: Path, runner: Any) -> None:
    model = tiny(Tiny("qwen2", 0, WIDE))
    number = gguf.GGMLQuantizationType[kind]
    stored = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            data = parameter.detach().numpy()
            stored[name] = _random_blocks(data.shape, kind) if "K" in kind else gguf.quantize(data, number)
            parameter.data.copy_(torch.from_numpy(gguf.dequantize(stored[name], number)))
    theirs = model(IDS).logits
    assert theirs.std() > 0.01
    path = write_gguf(tmp_path / "model.gguf", "qwen2", model, kind=kind, stored=stored)
    opened = runner(path, torch.float32)
    torch.testing.assert_close(opened.full(IDS, [0] * len(IDS)), theirs, rtol=0, atol=1e-4)
    assert opened.spec.dtype == torch.bfloat16
    (up,) = [weight for weight in opened.layers[2].weights if weight.name == "up.weight"]
    assert opened.checkpoint.extent(up) is None
    whole = opened.checkpoint.read(up, torch.float32)
    torch.testing.assert_close(
        opened.checkpoint.read(up, torch.float32, range(5, 9)), whole[5:9], rtol=0, atol=0
    )


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_tensors_are_read_in_place(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny(Tiny("llama", 0, WIDE)), kind=kind)
    spec, checkpoint = open_model(path)
    assert spec.dtype == dtype
    (up,) = [weight for weight in build_layers(spec)[2].weights if weight.name == "up.weight"]
    extent = checkpoint.extent(up)
    assert extent is not None and extent.path == path and extent.dtype == dtype
    values = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    part = values[extent.offset : extent.offset + extent.nbytes].clone().view(dtype).view(extent.shape)
    assert torch.equal(part, checkpoint.read(up, dtype))


def test_experts_in_mxfp4(tmp_path: Path, runner: Any) -> None:
    """gpt-oss as it is published: MXFP4 experts, and the rest in other types."""
    model = tiny(Tiny("gpt_oss", 0, dict(hidden_size=64, intermediate_size=32, swiglu_limit=7.0)))
    mxfp4 = gguf.GGMLQuantizationType.MXFP4
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            data = parameter.detach().transpose(1, 2).contiguous().numpy()
            decoded = torch.from_numpy(gguf.dequantize(gguf.quantize(data, mxfp4), mxfp4))
            parameter.data.copy_(decoded.transpose(1, 2))
    path = write_gguf(tmp_path / "model.gguf", "gpt-oss", model, kind="MXFP4", only="_exps.weight")
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors if "_exps.w" in tensor.name} == {
        mxfp4
    }
    ours = runner(path, torch.float32).full(IDS, [0] * len(IDS))
    torch.testing.assert_close(ours, model(IDS).logits, rtol=0, atol=1e-4)


def test_a_model_in_several_files(tmp_path: Path, runner: Any) -> None:
    model = tiny(Tiny("qwen3"))
    path = write_gguf(tmp_path / "model.gguf", "qwen3", model, size=20_000)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) > 2 and path == shards[0]
    theirs = model(IDS).logits
    for given in (path, shards[1], tmp_path):
        ours = runner(given, torch.float32).full(IDS, [0] * len(IDS))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is missing. Download it again"):
        open_model(path)


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model-Q8_0.gguf", "llama", tiny(Tiny("llama")))
    (tmp_path / "mmproj-model.gguf").write_bytes(b"")
    assert open_model(tmp_path)[1].directory == path
    shutil.copy(path, tmp_path / "model-Q4_0.gguf")
    with pytest.raises(
        ModelError, match=r"several GGUF files: give the path of one, for example .*Q4_0\.gguf"
    ):
        open_model(tmp_path)


def test_weights_of_another_config_cannot_be_a_gguf_file(tmp_path: Path) -> None:
    model = tiny(Tiny("llama"))
    write_gguf(tmp_path / "model.gguf", "llama", model)
    with pytest.raises(
        CheckpointError, match=r"model\.gguf is in the GGUF format.*: give this file as the model"
    ):
        open_model(model.config, weights=tmp_path)


def test_other_weights_in_a_folder_are_preferred(tmp_path: Path) -> None:
    model = tiny(Tiny("llama"))
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", "llama", model)
    assert not isinstance(open_model(tmp_path)[1], GGUFCheckpoint)


@pytest.mark.parametrize("name", ["missing.gguf", "somewhere/missing.gguf"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=r"missing\.gguf: there is no such file"):
        open_model(name)


def test_dummy_weights_need_the_metadata_only(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny(Tiny("llama")))
    assert open_model(path, "dummy")[0] == open_model(path)[0]


@pytest.mark.parametrize("kind", ["IQ4_XS", "TQ1_0", "Q8_K"])
def test_other_types_are_refused_with_what_to_download(kind: str, tmp_path: Path) -> None:
    model = tiny(Tiny("qwen2", 0, WIDE))
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    name = "model.layers.1.mlp.up_proj.weight"
    stored = {name: np.zeros((512, 256 // block * nbytes), dtype=np.uint8)}
    path = write_gguf(
        tmp_path / "model.gguf", "qwen2", model, kind=kind, stored=stored, only="blk.1.ffn_up.weight"
    )
    spec, checkpoint = open_model(path)
    message = (
        rf"blk.1.ffn_up.weight has the type {kind}, which is not supported.* Download the model as Q8_0 or Q4"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(build_layers(spec))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny(Tiny("llama")), left_out="blk.1.ffn_up.weight")
    spec, checkpoint = open_model(path)
    with pytest.raises(CheckpointError, match=r"model\.gguf: 1 tensor missing: blk\.1\.ffn_up\.weight"):
        checkpoint.verify(build_layers(spec))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "qwen2", tiny(Tiny("qwen2", 0, WIDE)), kind="Q8_0")
    spec, checkpoint = open_model(path)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="it has changed since it was opened"):
        for layer in build_layers(spec):
            for weight in layer.weights:
                checkpoint.read(weight, torch.float32)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny(Tiny("qwen2", 0, WIDE))
    blocks = gguf.quantize(np.ones((512, 256), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    blocks[7, :2] = np.full(1, np.nan, dtype=np.float16).view(np.uint8)
    stored = {"model.layers.1.mlp.up_proj.weight": blocks}
    path = write_gguf(tmp_path / "model.gguf", "qwen2", model, kind="Q8_0", stored=stored)
    spec, checkpoint = open_model(path)
    (up,) = [weight for weight in build_layers(spec)[4].weights if weight.name == "up.weight"]
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight contains NaN or infinite values"):
        checkpoint.read(up, torch.float32)


def test_without_the_package_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny(FILES["llama"][0]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"need the package gguf, .* pip install 'flexgen\[gguf\]'"):
        open_model(path)
