"""Floats of 8 bits: sign, 4 bits of exponent, 3 of mantissa, without infinity (`torch.float8_e4m3fn`)."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn

_FROM_HALF = 2.0**8
"""The quotient of an e4m3 and the float16 with the same bits: their exponent biases are 7 and 15."""


def scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes (uint8) times scales, which are float32 and can be broadcast, in float32.

    On a CPU, torch's own conversion takes ten times as long. The codes of NaN give numbers there.
    """
    if codes.device.type != "cpu":
        return codes.view(E4M3).to(torch.float32).mul_(scales)
    # A sign-extended and shifted code has its sign in two bits, then the exponent. The second bit is cleared.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).to(torch.float32).mul_(scales * _FROM_HALF)


def has_nan(codes: Tensor) -> bool:
    """Whether any of the codes (uint8) is NaN."""
    return bool(codes.bitwise_and(0x7F).eq_(0x7F).any())
