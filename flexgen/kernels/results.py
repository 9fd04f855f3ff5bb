"""Memory for the results of kernels on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen.units import MIB

HUGE_PAGE = 2 * MIB
"""Bytes of a huge page of most processors."""
_ALIGNED = 2 * HUGE_PAGE


def empty_result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor with any values. From 4 MiB on, it begins with a huge page.

    The system clears a page when it is first written, which interrupts the kernel. A large tensor elsewhere would
    have hundreds of small pages before its first huge page. The bytes before the tensor take no memory, because
    nothing writes them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _ALIGNED:
        return torch.empty(*shape, dtype=dtype)
    room = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % HUGE_PAGE
    return room[begin : begin + nbytes].view(dtype).view(*shape)
