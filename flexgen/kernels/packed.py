"""The memory layout of group-wise integers, which all their kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class MatrixForm(NamedTuple):
    """How a matrix is stored, for kernels that read its parts by address.

    With 4 or 8 bits: codes, as in `Packed`, with scales and minimums for each `group`. e4m3: codes are floats of 8
    bits, with a scale for each row and without minimums. With 0 bits: values in the dtype of the product.
    """

    shape: tuple[int, int]
    bits: int
    group: int = 1
    scale_type: torch.dtype = torch.float32
    e4m3: bool = False
    biased: bool = False


class StoredMatrix(NamedTuple):
    """A matrix as kernels read it. Parts that its form does not have are None."""

    form: MatrixForm
    values: Tensor
    scales: Tensor | None = None
    minimums: Tensor | None = None
