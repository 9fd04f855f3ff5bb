"""Starts threads safely: `Thread.start` blocks forever if the new thread has no memory for its first objects."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from flexgen.errors import CapacityError, RequestError
from flexgen.units import MIB

_ROOM = 16 * MIB
"""Bytes that must be free before a thread is started: a stack, usually of 8 MiB, and the first objects."""

# Created in advance, because there may be no memory to create them when they are needed.
_NO_MEMORY = (
    "no thread can be started, because this process cannot allocate another 16 MiB of memory. Raise its "
    "address space limit (ulimit -v, RLIMIT_AS), or free memory"
)
_NO_THREADS = (
    "the system cannot start another thread. End other programs, raise the process limit (ulimit -u, or pids of "
    "the cgroup), or reduce the stack size of threads (ulimit -s)"
)


def start(thread: threading.Thread) -> None:
    """Start `thread`. Raises CapacityError if there is no memory for it, and RequestError if there are too many.

    Ctrl-C raises KeyboardInterrupt; the thread may have started by then.
    """
    with _named_errors():
        thread.start()


def pool(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose `count` threads have all started, so that `submit` never fails because a thread cannot start.

    Raises like `start`, and then leaves no thread running.
    """
    made = ThreadPoolExecutor(count, thread_name_prefix=name)
    gate = threading.Barrier(count)
    try:
        started = []
        for _ in range(count):
            with _named_errors():
                started.append(made.submit(gate.wait))  # each occupies one thread until all have started
        for future in started:
            future.result()
    except BaseException:
        gate.abort()
        made.shutdown(cancel_futures=True)
        raise
    return made


@contextmanager
def _named_errors() -> Iterator[None]:
    """A context for the start of one thread, which raises flexgen's errors."""
    try:
        mmap.mmap(-1, _ROOM).close()
    except (OSError, MemoryError) as error:
        raise CapacityError(_NO_MEMORY) from error
    try:
        yield
    except RuntimeError as error:
        interrupt = error.__context__
        if interrupt is not None and not isinstance(interrupt, Exception):
            # A signal arrived while Thread.start waited: its condition then fails to release its lock.
            raise interrupt from None
        raise RequestError(_NO_THREADS) from error
