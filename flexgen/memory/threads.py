"""Starting threads: `Thread.start` waits for ever where the new thread has no memory for its first objects."""

from __future__ import annotations

import mmap
import threading

from flexgen.errors import CapacityError, RequestError
from flexgen.units import MIB

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


def start(thread: threading.Thread) -> None:
    """Start `thread`. Raises CapacityError where there is no memory for it, RequestError where there are too many.

    Ctrl-C raises KeyboardInterrupt; the thread may have begun then.
    """
    try:
        mmap.mmap(-1, _ROOM).close()
    except (OSError, MemoryError) as error:
        raise CapacityError(_NO_MEMORY) from error
    try:
        thread.start()
    except RuntimeError as error:
        interrupt = error.__context__
        if interrupt is not None and not isinstance(interrupt, Exception):
            # A signal arrived while Thread.start waited: the condition that it uses then fails to release its lock.
            raise interrupt from None
        raise RequestError(_NO_THREADS) from error
