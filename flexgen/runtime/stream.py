"""Results of a run while it runs: the run has a thread, and the caller iterates over its results."""

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
    """Ends a run that nobody waits for any more."""


class Teller(Generic[T]):
    """A run's side of a stream."""

    def __init__(self) -> None:
        # An item, or the end: with the error of the run, or None.
        self.queue: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self.abandoned = False

    def tell(self, item: T) -> None:
        """Hand an item to the stream. Never waits: the run goes on, whether the item is taken or not."""
        self.queue.put((item,))

    def check(self) -> None:
        """Raise Abandoned once the stream was closed. A run calls it now and then."""
        if self.abandoned:
            raise Abandoned


class Stream(Iterator[T]):
    """The items that `run` tells, in their order; it runs in a thread, from now on.

    An error of the run is raised where the next item would come. Closing the stream, leaving it as a context
    manager, dropping the last reference to it or leaving the interpreter ends the run at its next `check` and
    waits for that; so does Ctrl-C while waiting for an item. What was told and not taken is gone then.
    """

    def __init__(self, run: Callable[[Teller[T]], object]) -> None:
        self._teller: Teller[T] = Teller()
        thread = threading.Thread(
            target=_serve, args=(run, self._teller), name=f"{_OWN_THREADS}stream", daemon=True
        )
        # The thread must not refer to the stream, or it would never be dropped.
        self._finalizer = weakref.finalize(self, _stop, self._teller, thread)
        self._process = os.getpid()
        try:
            threads.start(thread)
        except BaseException:  # Ctrl-C: the run may have begun, and nobody gets the stream
            self.close()
            raise

    def __next__(self) -> T:
        if os.getpid() != self._process:
            raise RequestError(
                "this stream was begun by another process, of which this one is a fork: its run is not copied by a "
                "fork. Iterate in the parent, or open the model in the child"
            )
        if not self._finalizer.alive:
            raise StopIteration
        try:
            told = self._teller.queue.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(told, tuple):
            return told[0]
        self.close()
        if told is not None:
            raise told
        raise StopIteration

    def close(self) -> None:
        """End the run, if it still goes on."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve(run: Callable[[Teller[T]], object], teller: Teller[T]) -> None:
    try:
        teller.check()  # Ctrl-C came while the thread was started: `_stop` does not wait for a run that has not begun
        run(teller)
    except Abandoned:
        teller.queue.put(None)
    except BaseException as error:  # whatever it is, the one who waits must hear of it
        teller.queue.put(error)
    else:
        teller.queue.put(None)


def _stop(teller: Teller[T], thread: threading.Thread) -> None:
    teller.abandoned = True
    # The garbage collector may call this in a thread that the run itself waits for.
    if not threading.current_thread().name.startswith(_OWN_THREADS):
        raised: BaseException | None = None
        while thread.is_alive():  # a thread that never began, or that a fork has not copied, is not
            try:
                thread.join()
            except BaseException as error:  # Ctrl-C: the run uses the model until it has ended
                raised = error
        if raised is not None:
            raise raised
