"""The formats of compressed-tensors (llm-compressor), and of NVIDIA's ModelOpt, whose configs are alike."""

from __future__ import annotations

from typing import Any

from flexgen.errors import ModelError, shown
from flexgen.formats.block_fp8 import WHOLE, BlockFP8, block_size
from flexgen.formats.encoding import Encoding, Settings
from flexgen.formats.fp4 import MXFP4, NVFP4
from flexgen.formats.integers import PackedRows

_SCALE = ".weight_scale"
_FORMATS = ("pack-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")


def read(settings: Settings) -> tuple[Encoding, ...]:
    """The encodings of `quant_method: compressed-tensors`: one for each group of modules."""
    groups = settings.inner("config_groups")
    found = []
    for key in groups.values:
        group = groups.inner(key)
        own = group.values.get("format") or settings.values.get("format")
        if own not in _FORMATS:
            raise ModelError(
                f"{settings.name}: format = {shown(own)} is not supported; supported: {', '.join(_FORMATS)}"
            )
        found.append(_encoding(str(own), group.inner("weights")))
    if not found:
        raise ModelError(f"{settings.name}: config_groups is empty; expected the formats of the weights")
    return tuple(dict.fromkeys(found))


def _encoding(form: str, weights: Settings) -> Encoding:
    if form == "nvfp4-pack-quantized":
        return NVFP4(".weight_packed", ".weight_global_scale", divides=True)
    if form == "mxfp4-pack-quantized":
        return MXFP4(".weight_packed", _SCALE, by_group=False)
    if form == "float-quantized":
        weights.one_of("num_bits", (8,))
        weights.one_of("type", ("float",))
        strategy = weights.one_of("strategy", ("block", "channel", "tensor"))
        if strategy == "block":
            block: Any = weights.values.get("block_structure")
            return BlockFP8(_SCALE, *block_size(block, weights.name, "block_structure"))
        return BlockFP8(_SCALE, 1 if strategy == "channel" else WHOLE, WHOLE)
    bits = weights.one_of("num_bits", (4, 8))
    weights.one_of("type", ("int",))
    # With "weight", the columns of a group are those of the matrix; with "group" they are stored in another order.
    weights.one_of("actorder", (None, False, "weight", "static"))
    strategy = weights.one_of("strategy", ("group", "channel"))
    group = weights.size("group_size") if strategy == "group" else 0
    return PackedRows(bits, group, symmetric=weights.one_of("symmetric", (True, False)))


def read_modelopt(settings: Settings) -> tuple[Encoding, ...]:
    """The encodings of `quant_method: modelopt`."""
    if settings.one_of("quant_algo", ("NVFP4", "FP8")) == "FP8":
        return (BlockFP8(_SCALE, WHOLE, WHOLE),)
    return (NVFP4(".weight", ".weight_scale_2", divides=False),)
