"""Floats of 4 bits: sign, 2 bits of exponent, 1 of mantissa. A byte has two of them, the first in its low bits."""

from __future__ import annotations

import torch
from torch import Tensor

_FROM_HALF = 2.0**14
"""The quotient of an e2m1 and the float16 with the same bits: their exponent biases are 1 and 15."""


def scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (..., n), uint8, as (..., groups, 2 n / groups), times scales (..., groups), both in float32."""
    # Both values of a byte become halves of a word: the second code moves to the upper half, the sign bits
    # to bit 15 of each half, and the other three bits to bits 9 to 11.
    words = codes.to(torch.int32)
    words.bitwise_or_(words << 12)
    signs = (words & 0x0008_0008).bitwise_left_shift_(12)
    halves = words.bitwise_and_(0x0007_0007).bitwise_left_shift_(9).bitwise_or_(signs).view(torch.float16)
    return (
        halves.to(torch.float32).unflatten(-1, (scales.shape[-1], -1)).mul_((scales * _FROM_HALF)[..., None])
    )
