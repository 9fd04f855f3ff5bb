"""Products of groups of rows, each with a matrix of its own, in one launch on a GPU.

A mixture of experts multiplies each expert with the rows that chose it. The numbers of rows are on the GPU, and one
product for each expert needs them on the host. torch's grouped product reads them on the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_CAPABILITY = (8, 0)
"""The lowest compute capability of torch's grouped product."""
_ALIGNMENT = 16
"""Bytes. Rows and matrices begin at multiples of it."""


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product in `dtype` on the device."""
    return (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


def stacked(matrices: Sequence[Any]) -> Tensor | None:
    """A view (count, out, in) of matrices that are stored at equal distances; None for any others.

    The weights of a layer are stored one after another, so its experts can be stacked if all have the same home.
    """
    first = matrices[0]
    if not all(isinstance(m, Tensor) and m.layout is torch.strided and m.is_contiguous() for m in matrices):
        return None
    if len({(m.shape, m.dtype, m.untyped_storage().data_ptr()) for m in matrices}) > 1:
        return None
    offsets = [m.storage_offset() for m in matrices]
    steps = {after - before for before, after in itertools.pairwise(offsets)} or {first.numel()}
    step, item = steps.pop(), first.itemsize
    aligned = (
        all(n * item % _ALIGNMENT == 0 for n in (step, first.shape[1])) and not first.data_ptr() % _ALIGNMENT
    )
    if steps or step < first.numel() or not aligned:
        return None
    return first.as_strided((len(matrices), *first.shape), (step, first.shape[1], 1))


def grouped_linear(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x (rows, in) @ the matrix (out, in) of each row's group, transposed.

    stack: (groups, out, in). ends: (groups,) int32, the end of each group's rows. Does not wait for the device.
    """
    return F.grouped_mm(x, stack.transpose(1, 2), offs=ends)
