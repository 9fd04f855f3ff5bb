"""Fills host buffers with weights on all cores: each thread reads, checks and encodes a few rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from flexgen.kernels.threads import take_no_others
from flexgen.memory import threads
from flexgen.memory.first_read import check_finite
from flexgen.models.checkpoint import Extent
from flexgen.models.plain_files import read_into


class Workers:
    """As many threads as torch computes with. They start with the first work that is worth them.

    It is a context manager: its exit ends the threads.
    """

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Run all tasks, in any order. Raises the first exception of a task; tasks that have not begun do not run."""
        tasks = list(tasks)
        if not tasks:
            return
        self._pool = self._pool or threads.pool(self.count, "open")
        failed = threading.Event()
        futures = [self._pool.submit(_run, task, failed) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:  # also after Ctrl-C: no task may write to a buffer that its owner has released
            failed.set()
            for future in futures:
                future.cancel()
            wait(futures)


def _run(task: Callable[[], object], failed: threading.Event) -> None:
    """Run a task, unless another one has failed."""
    if failed.is_set():
        return
    take_no_others()  # each core has a thread of its own
    try:
        task()
    except BaseException:
        failed.set()
        raise


_own = threading.local()


def staging(nbytes: int) -> Tensor:
    """A buffer of the calling thread, uint8 (nbytes,), which the next call reuses.

    New memory for each piece would be cleared by the system each time, which takes longer than to read the piece.
    """
    if getattr(_own, "buffer", None) is None or _own.buffer.nbytes < nbytes:
        _own.buffer = torch.empty(nbytes, dtype=torch.uint8)
    buffer: Tensor = _own.buffer[:nbytes]
    return buffer


def read_checked(extent: Extent, key: str, begin: int, out: Tensor) -> None:
    """Read bytes of a weight from its file to `out` (uint8, in host memory), from byte `begin` of the weight on.

    Raises CheckpointError if the file cannot be read or is too short, and for NaN and infinite values.
    """
    read_into(memoryview(out.numpy()), extent.path, extent.offset + begin, key)  # type: ignore[arg-type]
    check_finite(out, extent.dtype, extent.path, key)
