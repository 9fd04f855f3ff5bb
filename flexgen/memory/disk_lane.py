"""The lane of disk reads, which starts what comes next while the last chunks of a read are still on their way.

A read is cut into chunks for several threads. If each read were waited for before the next one starts, the
threads would idle while its last chunk comes in.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from flexgen.memory import threads
from flexgen.memory.lanes import Cancelled, Done, HostDone, Job, ThreadLane, failure
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Step

_IN_FLIGHT = 2
"""Jobs that are on their way at once: one at its end, one that fills the threads."""


class Pending(Protocol):
    """The second half of a job."""

    def wait(self) -> None:
        """Block until it is done; afterwards, failed or not, it touches no buffer. Called once."""


@runtime_checkable
class Startable(Protocol):
    """A job that can be done in two halves; called, it does both."""

    def __call__(self) -> object: ...

    def start(self) -> Pending | None:
        """Begin, and return while the work goes on; None says that it is done already."""


@dataclass
class _Flight:
    """A job that has been started, done or failed."""

    step: Step
    done: HostDone
    start: float = 0.0
    end: float = 0.0
    pending: Pending | None = None
    error: BaseException | None = None


class DiskLane(ThreadLane):
    """Starts jobs in order, each when what it needs is done, and ends them in the same order.

    One thread starts jobs and does those that are no `Startable`; a second one waits for their ends, since the
    first may be waiting for what the next job needs. A job's event covers the time in which no earlier one was on
    its way, so that the lane's busy time counts no second twice.
    """

    def __init__(
        self,
        name: LaneName,
        in_flight: int = _IN_FLIGHT,
        within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        super().__init__(name, within=within)
        self._in_flight = in_flight
        self._flying = 0
        self._changed = threading.Condition()
        self._flights: queue.SimpleQueue[_Flight | HostDone | None] = queue.SimpleQueue()
        self._free_at = 0.0  # when the last job that has ended did so
        self._waiter = threading.Thread(target=self._land_all, name=f"flexgen-{name}-end", daemon=True)

    def start(self) -> Self:
        super().start()
        threads.start(self._waiter)
        return self

    def _serve(self) -> None:
        try:
            super()._serve()
        finally:  # no more flights come
            self._flights.put(None)

    def _run(self, job: Job, after: Sequence[Done], step: Step, done: HostDone) -> None:
        flight = _Flight(step, done)
        try:
            for other in after:
                other.wait()
            with self._changed:
                self._changed.wait_for(lambda: self._flying < self._in_flight)
            if self._cancelled:
                raise Cancelled("an earlier step failed, or the caller gave up")
            flight.start = time.perf_counter()
            if isinstance(job, Startable):
                flight.pending = job.start()
            else:
                job()
            flight.end = time.perf_counter()
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            flight.error = error
        with self._changed:
            alone = not self._flying
            self._flying += 1
        if alone and flight.pending is None:
            self._land(flight)  # without a hop to the other thread
        else:
            self._flights.put(flight)

    def _land_all(self) -> None:
        while (flight := self._flights.get()) is not None:
            if isinstance(flight, HostDone):
                flight.finish()
            else:
                self._land(flight)
            del flight  # no buffer is held while the lane is idle

    def _land(self, flight: _Flight) -> None:
        error = flight.error
        if flight.pending is not None:
            try:
                flight.pending.wait()
                flight.end = time.perf_counter()
            except BaseException as caught:
                error = caught
        if error is None:
            start = max(flight.start, self._free_at)
            self._free_at = max(start, flight.end)
            self._events.append(Event(flight.step, self.name, start, self._free_at))
        flight.done.finish(error and failure(flight.step, self.name, error))
        with self._changed:
            self._flying -= 1
            self._changed.notify()

    def drain(self) -> None:
        super().drain()
        landed = HostDone()
        self._flights.put(landed)
        landed.wait()

    def close(self) -> None:
        super().close()
        if self._waiter.is_alive():
            self._waiter.join()
