"""Streams the results of a run in a background thread: the caller iterates over them."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

from flexgen.errors import RequestError
from flexgen.memory import threads

T = TypeVar("T")

_OWN_THREADS = "flexgen-"


class Abandoned(Exception):
    """Ends a run whose stream was closed."""


class StreamWriter(Generic[T]):
    """The run's end of a stream."""

    def __init__(self) -> None:
        # An item, or at the end, the error of the run or None.
        self.queue: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self.abandoned = False

    def put(self, item: T) -> None:
        """Add an item to the stream. Never blocks: the run continues even if nobody reads the item."""
        self.queue.put((item,))

    def check(self) -> None:
        """Raise Abandoned if the stream was closed. A run must call it regularly."""
        if self.abandoned:
            raise Abandoned


class Stream(Iterator[T]):
    """Iterates over the items that `run` adds, in order. `run` starts immediately in a thread.

    An error of the run is raised in place of the next item. To end the run at its next `check` and wait for that,
    close the stream, leave it as a context manager, drop the last reference to it, or exit the interpreter. Ctrl-C
    while waiting for an item does the same. Items that were not read are then discarded.
    """

    def __init__(self, run: Callable[[StreamWriter[T]], object]) -> None:
        self._writer: StreamWriter[T] = StreamWriter()
        thread = threading.Thread(
            target=_serve, args=(run, self._writer), name=f"{_OWN_THREADS}stream", daemon=True
        )
        # The thread must not refer to the stream, or the stream would never be freed.
        self._finalizer = weakref.finalize(self, _stop, self._writer, thread)
        self._process = os.getpid()
        try:
            threads.start(thread)
        except BaseException:  # Ctrl-C: the run may have begun, and no caller has the stream
            self.close()
            raise

    def __next__(self) -> T:
        if os.getpid() != self._process:
            raise RequestError(
                "this stream belongs to another process, and this process is a fork of it: a fork does not copy the "
                "run. Iterate in the parent, or open the model in the child"
            )
        if not self._finalizer.alive:
            raise StopIteration
        try:
            received = self._writer.queue.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(received, tuple):
            return received[0]
        self.close()
        if received is not None:
            raise received
        raise StopIteration

    def close(self) -> None:
        """End the run, if it is still running."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve(run: Callable[[StreamWriter[T]], object], writer: StreamWriter[T]) -> None:
    try:
        writer.check()  # Ctrl-C came during the thread's start: `_stop` does not wait for a run that has not begun
        run(writer)
    except Abandoned:
        writer.queue.put(None)
    except BaseException as error:  # every error is raised in the caller's iteration
        writer.queue.put(error)
    else:
        writer.queue.put(None)


def _stop(writer: StreamWriter[T], thread: threading.Thread) -> None:
    writer.abandoned = True
    # The garbage collector may call this in a thread that the run itself waits for.
    if not threading.current_thread().name.startswith(_OWN_THREADS):
        raised: BaseException | None = None
        while thread.is_alive():  # False for a thread that never began or that a fork has not copied
            try:
                thread.join()
            except BaseException as error:  # Ctrl-C: the run uses the model until it has ended
                raised = error
        if raised is not None:
            raise raised
