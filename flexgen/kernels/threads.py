"""The number of threads that torch's CPU operations use in the calling thread only.

Each thread that runs such an operation gets its own team of OpenMP threads, which stays until that thread ends. If
the teams of a process together have more threads than there are cores, GNU's runtime lets all of them sleep between
operations; otherwise they spin. On two cores, a second team that was almost idle made attention over 64 tokens take
twice as long, a product of 8 rows 1.27 times and one of 256 rows 1.04 times as long. So while one thread computes,
threads that only do bookkeeping must have no team. `torch.set_num_threads` applies to the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_own = threading.local()


@functools.cache
def _setter() -> Callable[[int], object] | None:
    """`omp_set_num_threads` of the runtime that torch uses, or None if it is not found."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        setter: Callable[[int], object] = library.omp_set_num_threads
        return setter
    return None


def take_no_others() -> None:
    """Run later operations of the calling thread without further threads, except within `all_threads`."""
    if (setter := _setter()) and not hasattr(_own, "most"):
        _own.most = torch.get_num_threads()  # also triggers torch's initialisation of the thread
        setter(1)


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """A context in which operations use the same threads as without `take_no_others`."""
    setter, most = _setter(), getattr(_own, "most", None)
    if setter is None or most is None:
        yield
        return
    setter(most)
    try:
        yield
    finally:
        setter(1)
