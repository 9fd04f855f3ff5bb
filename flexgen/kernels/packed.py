"""The memory layout of group-wise integers, which all their kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Values in groups along the last dimension, which is (..., n).

    With four bits, the low nibbles of a group's bytes store the first half of the group, and the high nibbles the
    second half, so that unpacking moves whole vectors.
    """

    values: Tensor  # uint8 (..., n * bits / 8)
    scales: Tensor  # float16 or bfloat16 (..., n / group)
    minimums: Tensor  # like scales
    bits: int
    group: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the decoded tensor."""
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * self.group))
