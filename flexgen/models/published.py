"""The bytes of weights in the format in which they are published."""

from __future__ import annotations

import torch

from flexgen.models.known import Format
from flexgen.models.spec import WeightSpec

_FP8_BLOCK = 128
"""Published fp8 weights have a float32 scale for each block of 128 x 128 values."""
_MXFP4_GROUP = 32
"""MXFP4 has 4 bits for each value, and a scale of 8 bits for each group of 32 values."""


def published_bytes(weight: WeightSpec, dtype: torch.dtype, form: Format | None) -> int:
    """The bytes of a weight. dtype: that of the model, in which the weights without a format are.

    Names of files, headers and padding are not included.
    """
    matrix = len(weight.shape) == 2 and weight.encodable
    if form == "mxfp4 experts" and matrix and weight.unit:
        return weight.numel // 2 + weight.numel // _MXFP4_GROUP
    if form == "fp8" and matrix and not weight.looked_up and weight.name != "head.weight":
        rows, columns = (-(-size // _FP8_BLOCK) for size in weight.shape)
        return weight.numel + 4 * rows * columns
    return weight.nbytes(dtype)
