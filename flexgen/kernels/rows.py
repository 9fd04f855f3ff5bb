"""Rows of a matrix by their indices. On a CPU, a compiled call copies a few of them, which a tape can record."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.loading import announce, native

MOST = 512
"""The most rows that the compiled call copies: it uses one thread."""


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices] for x (rows, size) and int64 indices (any shape), (*indices.shape, size).

    On a CPU, it raises RuntimeError or IndexError for an index that x does not have.
    """
    fits = x.device.type == indices.device.type == "cpu" and indices.numel() <= MOST
    if not (fits and x.is_contiguous() and indices.is_contiguous() and announce()):
        return F.embedding(indices, x)
    y = x.new_empty(*indices.shape, x.shape[1])
    nbytes = x.shape[1] * x.itemsize
    native.gather_rows(indices.numel(), nbytes, x.data_ptr(), len(x), indices.data_ptr(), y.data_ptr())
    return y
