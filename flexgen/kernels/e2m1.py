"""Floats of 4 bits: sign, 2 bits of exponent, 1 of mantissa. A byte has two of them, the first in its low bits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def widened(codes: Tensor) -> Tensor:
    """Codes (..., n), uint8, as (..., 2 n) in float32."""
    return _pairs(codes.device)[codes.to(torch.int32)].flatten(-2)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte, (256, 2)."""
    values = torch.tensor(_VALUES + tuple(-value for value in _VALUES))
    codes = torch.arange(256)
    return torch.stack([values[codes % 16], values[codes // 16]], dim=1).to(device)
