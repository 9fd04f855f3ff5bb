"""Tensors for the results of kernels on the CPU."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen.kernels.result_memory import HUGE_PAGE, RESULT_MEMORY
from flexgen.units import MIB

_ALIGNED = 2 * HUGE_PAGE
_LEAST_KEPT = MIB
"""Bytes. While a call runs, results of at least this size use the memory of freed ones."""


def empty_result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor with any values. From 4 MiB on, it begins with a huge page.

    The system clears a page when it is first written, which interrupts the kernel. With huge pages, this happens less
    often. Many systems use them only where a process asks for them. The bytes before the tensor take no memory,
    because nothing writes them. Raises RuntimeError if the system cannot allocate the memory.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _LEAST_KEPT and RESULT_MEMORY.keeps:
        try:
            memory = RESULT_MEMORY.take(nbytes)
        except OSError as error:
            raise RuntimeError(f"a result of {nbytes} bytes cannot be allocated: {error.strerror}") from error
        if memory is not None:
            return torch.frombuffer(memory, dtype=dtype).view(*shape)
    if nbytes < _ALIGNED:
        return torch.empty(*shape, dtype=dtype)
    room = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % HUGE_PAGE
    found = room[begin : begin + nbytes]
    _ask_for_huge_pages(found.data_ptr(), nbytes)
    return found.view(dtype).view(*shape)


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Ask the system to use huge pages for this memory. Does nothing on systems without huge pages.

    The rest after the last whole huge page keeps small pages, so that the result takes no more memory.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole = nbytes // HUGE_PAGE * HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
