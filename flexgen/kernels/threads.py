"""How many threads torch's operations on the CPU take in the calling thread, apart from all others.

Each thread that runs such an operation gets a team of OpenMP threads of its own, which stays until that thread ends.
Once the teams of a process have more threads than it has cores, GNU's runtime lets all of them sleep between
operations where it had them spin. On two cores a second team, which had done next to nothing, made attention to 64
tokens take twice as long, a product of 8 rows 1.27 times and one of 256 rows 1.04 times as long. So beside a thread
that computes, those that only keep books are to have no team. `torch.set_num_threads` is for the whole process.
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
    """`omp_set_num_threads` of the runtime that torch uses; None where it is not found."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        setter: Callable[[int], object] = library.omp_set_num_threads
        return setter
    return None


def take_no_others() -> None:
    """From here on operations run in the calling thread alone, but within `all_threads`."""
    if (setter := _setter()) and not hasattr(_own, "most"):
        _own.most = torch.get_num_threads()  # which also does what torch does once in each thread
        setter(1)


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Operations take as many threads as they would without `take_no_others`."""
    setter, most = _setter(), getattr(_own, "most", None)
    if setter is None or most is None:
        yield
        return
    setter(most)
    try:
        yield
    finally:
        setter(1)
