"""Memory for the results of kernels on the CPU."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen.units import MIB

HUGE_PAGE = 2 * MIB
"""Bytes of a huge page of most processors."""
_ALIGNED = 2 * HUGE_PAGE


def empty_result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor with any values. From 4 MiB on, it begins with a huge page.

    The system clears a page when it is first written, which interrupts the kernel. With small pages, a product with
    1,024 rows of 1,024 values takes 6 to 10 % longer. Many systems use huge pages only where a process asks for them.
    The bytes before the tensor take no memory, because nothing writes them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _ALIGNED:
        return torch.empty(*shape, dtype=dtype)
    room = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % HUGE_PAGE
    found = room[begin : begin + nbytes]
    _ask_for_huge_pages(found.data_ptr(), nbytes)
    return found.view(dtype).view(*shape)


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Does nothing on systems without them. Only whole huge pages are asked for, so that no more memory is taken."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole = nbytes // HUGE_PAGE * HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
