"""Writers of tiny checkpoints in quantized formats, by the layouts that their libraries document.

Each format has a function that rounds a matrix (out, in) and returns its tensors by suffix, and the matrix of the
rounded values in float32, which it computes before it packs the codes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tiny_families import random_model
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

E4M3 = torch.float8_e4m3fn
Rounded = tuple[dict[str, Tensor], Tensor]
Round = Callable[[Tensor], Rounded]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 += [-value for value in FP4]


class Format(NamedTuple):
    """The quantization_config of a format, and the function that rounds a matrix."""

    config: dict[str, Any]
    round: Round


def _blocks_of(scales: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    """The scale of each value, for scales of blocks."""
    return scales[torch.arange(shape[0]) // rows][:, torch.arange(shape[1]) // columns]


def fp8(rows: int, columns: int, suffix: str, scale_dtype: torch.dtype = torch.float32) -> Round:
    def rounded(w: Tensor) -> Rounded:
        down, across = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
        scales = torch.empty(down, across)
        for i in range(down):
            for j in range(across):
                block = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[i, j] = block.abs().max() / 448
        scales = scales.to(scale_dtype)
        wide = _blocks_of(scales.float(), rows, columns, w.shape)
        codes = (w / wide).to(E4M3)
        return {".weight": codes, suffix: scales}, codes.float() * wide

    return rounded


def fp8_whole(suffix: str) -> Round:
    def rounded(w: Tensor) -> Rounded:
        scale = w.abs().max() / 448
        codes = (w / scale).to(E4M3)
        return {".weight": codes, suffix: scale}, codes.float() * scale

    return rounded


def nearest_fp4(x: Tensor) -> Tensor:
    """The codes of the nearest e2m1 values, int64."""
    return (x[..., None] - torch.tensor(FP4)).abs().argmin(-1)


def low_first(codes: Tensor) -> Tensor:
    """Codes of 4 bits (..., n) in bytes, the first in the low bits."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def mxfp4(codes_suffix: str, scales_suffix: str, by_group: bool) -> Round:
    def rounded(w: Tensor) -> Rounded:
        groups = w.unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(-1) / 6).clamp_min(2.0**-100).log2().ceil()
        codes = nearest_fp4(groups / 2 ** exponents[..., None])
        values = torch.tensor(FP4)[codes] * 2 ** exponents[..., None]
        packed = low_first(codes)
        tensors = {
            codes_suffix: packed if by_group else packed.flatten(-2),
            scales_suffix: (exponents + 127).to(torch.uint8),
        }
        return tensors, values.flatten(-2)

    return rounded


def nvfp4(codes_suffix: str, overall_suffix: str, divides: bool) -> Round:
    def rounded(w: Tensor) -> Rounded:
        overall = w.abs().max() / (6 * 448)
        groups = w.unflatten(-1, (-1, 16))
        scales = (groups.abs().amax(-1) / 6 / overall).to(E4M3)
        wide = scales.float()[..., None] * overall
        codes = nearest_fp4(groups / wide)
        stored = (1 / overall).reshape(1) if divides else overall
        tensors = {
            codes_suffix: low_first(codes.flatten(-2)),
            ".weight_scale": scales,
            overall_suffix: stored,
        }
        return tensors, (torch.tensor(FP4)[codes] * wide).flatten(-2)

    return rounded


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) in words of 32 bits, the first in the lowest bits; the last word is padded with zeros."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    total = sum(codes[..., n] << (bits * n) for n in range(each))
    return (
        torch.as_tensor(total).to(torch.int64).sub(2**32 * (torch.as_tensor(total) >= 2**31)).to(torch.int32)
    )


def integers(w: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zero points (out, groups) for values (code - zero) * scale, and the matrix (out, groups, group)."""
    groups, levels = w.unflatten(-1, (-1, group)), 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(-1) / (levels // 2)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = (most - least) / levels
        zeros = (-least / scales).round().clamp(1, levels)
    return scales, zeros, groups


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Rounded:
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(-2), ((codes - zeros[..., None]) * scales[..., None]).flatten(-2)  # type: ignore[return-value]


def packed_rows(bits: int, group: int | None, symmetric: bool) -> Round:
    def rounded(w: Tensor) -> Rounded:
        scales, zeros, groups = integers(w, bits, group or w.shape[1], symmetric)
        scales = scales.bfloat16().float()
        codes, values = _codes(groups, scales, zeros, bits)
        tensors = {
            ".weight_packed": words(codes, bits),
            ".weight_scale": scales.bfloat16(),
            ".weight_shape": torch.tensor(w.shape),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return tensors, values

    return rounded


def gptq(bits: int, group: int, symmetric: bool, added: int = 1) -> Round:
    def rounded(w: Tensor) -> Rounded:
        scales, zeros, groups = integers(w, bits, group if group > 0 else w.shape[1], symmetric)
        scales = scales.half().float()
        codes, values = _codes(groups, scales, zeros, bits)
        tensors = {
            ".qweight": words(codes, bits).T.contiguous(),
            ".qzeros": words(zeros.T - added, bits),
            ".scales": scales.half().T.contiguous(),
            ".g_idx": torch.arange(w.shape[1], dtype=torch.int32) // (w.shape[1] // scales.shape[1]),
        }
        return tensors, values

    return rounded


def awq(group: int) -> Round:
    def shuffled(codes: Tensor) -> Tensor:
        return words(codes.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2), 4)

    def rounded(w: Tensor) -> Rounded:
        scales, zeros, groups = integers(w, 4, group, symmetric=False)
        scales = scales.half().float()
        codes, values = _codes(groups, scales, zeros, 4)
        tensors = {
            ".qweight": shuffled(codes.T),
            ".qzeros": shuffled(zeros.T),
            ".scales": scales.half().T.contiguous(),
        }
        return tensors, values

    return rounded


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = dict(targets=["Linear"], weights=weights, input_activations=None)
    return dict(
        quant_method="compressed-tensors", format=form, config_groups=dict(group_0=group), ignore=["lm_head"]
    )


def _pack(bits: int, symmetric: bool, group: int | None) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    return _compressed(
        "pack-quantized",
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy=strategy,
        group_size=group,
        actorder=None,
    )


_FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic")
_INV, _SCALE = ".weight_scale_inv", ".weight_scale"

FORMATS: dict[str, Format] = {
    "fp8 in blocks": Format(_FP8 | dict(weight_block_size=[24, 24]), fp8(24, 24, _INV)),
    "fp8 in blocks, bfloat16 scales": Format(
        _FP8 | dict(weight_block_size=[128, 128]), fp8(128, 128, _INV, torch.bfloat16)
    ),
    "fp8, one scale": Format(_FP8 | dict(weight_block_size=None), fp8_whole(_INV)),
    "float-quantized by rows": Format(
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8(1, 10**6, _SCALE)
    ),
    "float-quantized in blocks": Format(
        _compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 24]),
        fp8(16, 24, _SCALE),
    ),
    "modelopt fp8": Format(dict(quant_method="modelopt", quant_algo="FP8"), fp8_whole(_SCALE)),
    "mxfp4 pack": Format(
        _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4(".weight_packed", _SCALE, by_group=False),
    ),
    "nvfp4 pack": Format(
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4(".weight_packed", ".weight_global_scale", divides=True),
    ),
    "modelopt nvfp4": Format(
        dict(quant_method="modelopt", quant_algo="NVFP4"), nvfp4(".weight", ".weight_scale_2", divides=False)
    ),
    "int4 pack": Format(_pack(4, True, 16), packed_rows(4, 16, True)),
    "int4 pack, zero points": Format(_pack(4, False, 16), packed_rows(4, 16, False)),
    "int8 pack by rows": Format(_pack(8, True, None), packed_rows(8, None, True)),
    "gptq": Format(dict(quant_method="gptq", bits=4, group_size=16, desc_act=False, sym=True), gptq(4, 16, True)),
    "gptq v2, zero points": Format(
        dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=False, checkpoint_format="gptq_v2"),
        gptq(4, 32, False, added=0),
    ),
    "gptq in 8 bits by rows": Format(
        dict(quant_method="gptq", bits=8, group_size=-1, desc_act=False, sym=False), gptq(8, -1, False)
    ),
    "awq": Format(dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"), awq(32)),
}  # fmt: skip
"""Formats of two-dimensional weights, by a name for tests."""


def _is_quantized(name: str, tensor: Tensor) -> bool:
    plain = ("embed_tokens", "lm_head", "mlp.gate.", "norm")
    return tensor.ndim == 2 and name.endswith(".weight") and not any(part in name for part in plain)


def save_quantized(model: PreTrainedModel, form: Format, directory: Path) -> None:
    """Write the model with its matrices in `form`, and round the matrices of `model` itself to the stored values."""
    model.save_pretrained(directory)
    own = dict(model.state_dict())
    tensors = stored_names(model, own)
    for name, tensor in list(tensors.items()):
        if _is_quantized(name, tensor):
            parts, values = form.round(tensor.float())
            del tensors[name]
            tensors |= {
                name.removesuffix(".weight") + suffix: part.contiguous() for suffix, part in parts.items()
            }
            tensor.copy_(values)  # also in the model: a view
    write(tensors, form.config, directory)


def stored_names(model: PreTrainedModel, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of the model's tensors by their names in checkpoints, which have a tensor for each expert."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for number, matrix in enumerate(tensor):
                path = f"{name.rpartition('.')[0]}.{number}"
                if name.endswith("down_proj"):
                    tensors[f"{path}.down_proj.weight"] = matrix
                else:
                    gate, up = matrix.chunk(2)
                    tensors |= {f"{path}.gate_proj.weight": gate, f"{path}.up_proj.weight": up}
        else:
            tensors[name] = tensor
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def save_gpt_oss(model: PreTrainedModel, directory: Path) -> None:
    """Write a gpt-oss with its experts in MXFP4, as OpenAI does, and round the experts of `model` itself."""
    model.save_pretrained(directory)
    tensors, rounded = dict(model.state_dict()), mxfp4("_blocks", "_scales", by_group=True)
    for name, tensor in list(tensors.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # (experts, in, out)
            parts, values = zip(*(rounded(matrix.T) for matrix in tensor), strict=True)
            tensor.copy_(torch.stack(values).mT)
            del tensors[name]
            tensors |= {name + suffix: torch.stack([part[suffix] for part in parts]) for suffix in parts[0]}
    write(tensors, dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"]), directory)


def write(tensors: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    """Write the tensors and a quantization_config to a directory that has the model in plain form."""
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=config)))


def tiny(family: str, **fields: Any) -> PreTrainedModel:
    """A random model in float32."""
    sizes: dict[str, Any] = dict(
        vocab_size=67, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        return random_model(CONFIG_MAPPING[family](**copy.deepcopy(sizes | fields)))
