"""How group-wise integers lie in memory: what every kernel for them reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Values in groups along the last dimension, which is (..., n).

    In four bits the first half of a group lies in the low nibbles of the group's bytes and the second half
    in the high ones, so that unpacking moves whole vectors.
    """

    values: Tensor  # uint8 (..., n * bits / 8)
    scales: Tensor  # float16 or bfloat16 (..., n / group)
    minimums: Tensor  # like scales
    bits: int
    group: int

    @property
    def shape(self) -> torch.Size:
        """Of what was packed."""
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * self.group))
