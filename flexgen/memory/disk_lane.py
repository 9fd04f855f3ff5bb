"""The lane of disk reads, which starts the next read while the last chunks of the present one are in flight.

A read is divided into chunks for several threads. If the lane waited for each read before it started the next one,
threads would be idle during the last chunks.
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
"""The maximum number of jobs in flight: one that ends, and one that keeps the threads busy."""


class Pending(Protocol):
    """A job that has been started."""

    def wait(self) -> None:
        """Block until the job has ended or failed; then it accesses no buffer. Called once."""


@runtime_checkable
class Startable(Protocol):
    """A job that can be started and waited for separately. A call does both."""

    def __call__(self) -> object: ...

    def start(self) -> Pending | None:
        """Start the job and return while it runs, or return None if it is already done."""


@dataclass
class _Flight:
    """A job that has been started and is in flight, done or failed."""

    step: Step
    done: HostDone
    start: float = 0.0
    end: float = 0.0
    pending: Pending | None = None
    error: BaseException | None = None


class DiskLane(ThreadLane):
    """Starts jobs in order, each when the jobs that it needs are done, and ends them in the same order.

    One thread starts the jobs, and runs those that are not `Startable`. A second thread waits for their ends, because
    the first one may wait for a job of another lane. The event of a job covers only the time in which no earlier job
    was in flight, so that the busy time of the lane counts no second twice.
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
        self._free_at = 0.0  # the end of the last job that has ended
        self._waiter = threading.Thread(target=self._land_all, name=f"flexgen-{name}-end", daemon=True)

    def start(self) -> Self:
        super().start()
        threads.start(self._waiter)
        return self

    def _serve(self) -> None:
        try:
            super()._serve()
        finally:  # there are no more flights
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
        except BaseException as error:  # every error is reported through the Done
            flight.error = error
        with self._changed:
            alone = not self._flying
            self._flying += 1
        if alone and flight.pending is None:
            self._land(flight)  # without a thread switch
        else:
            self._flights.put(flight)

    def _land_all(self) -> None:
        while (flight := self._flights.get()) is not None:
            if isinstance(flight, HostDone):
                flight.finish()
            else:
                self._land(flight)
            del flight  # an idle lane must not refer to a buffer

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

    def _wait(self) -> None:
        super()._wait()
        landed = HostDone()
        self._flights.put(landed)
        landed.wait()

    def close(self) -> None:
        super().close()
        if self._waiter.is_alive():
            self._waiter.join()
