"""Starting threads: `Thread.start` waits for ever where the new thread has no memory for its first objects."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from flexgen.errors import CapacityError, RequestError
from flexgen.units import MIB

_T = TypeVar("_T")

_ROOM = 16 * MIB
"""Bytes that must be free before a thread is started: a stack, usually of 8 MiB, and the first objects."""

# Made in advance, since there may be no memory to make them when they are needed.
_NO_MEMORY = (
    "no thread can be started, because this process may not take 16 MiB more of memory. Raise the limit of its "
    "address space (ulimit -v, RLIMIT_AS), or free memory"
)
_NO_THREADS = (
    "the system starts no further thread. End other programs, raise the limit of processes (ulimit -u, or pids of "
    "the cgroup), or lower the size of a thread's stack (ulimit -s)"
)


class Pool(ThreadPoolExecutor):
    """A pool whose `submit` raises as `start` does where a thread that it needs cannot be started."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._startable = threads

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        if self._startable:  # a thread may be started for each of the first jobs
            _check_room()
        try:
            future = super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            if "after" in str(error):  # `shutdown`
                raise
            raise _reason(error) from error
        self._startable = max(self._startable - 1, 0)
        return future


def start(thread: threading.Thread) -> None:
    """Start `thread`. Raises CapacityError where there is no memory for it, RequestError where there are too many.

    Ctrl-C raises KeyboardInterrupt; the thread may have begun then.
    """
    _check_room()
    try:
        thread.start()
    except RuntimeError as error:
        raise _reason(error) from error


def _reason(error: RuntimeError) -> BaseException:
    """Why `Thread.start` raised `error`."""
    interrupt = error.__context__
    if interrupt is not None and not isinstance(interrupt, Exception):
        # A signal arrived while Thread.start waited: the condition that it uses then fails to release its lock.
        return interrupt
    return RequestError(_NO_THREADS)


def _check_room() -> None:
    try:
        mmap.mmap(-1, _ROOM).close()
    except (OSError, MemoryError) as error:
        raise CapacityError(_NO_MEMORY) from error
