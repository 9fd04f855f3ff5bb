"""The lanes of a GPU: CUDA streams. A job only enqueues, and events order the lanes on the device.

`StreamLane` enqueues jobs in the submitting thread. `CopyLane` serves a link and never blocks that thread: its own
thread enqueues the jobs that must first wait for host work, such as a disk read.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from flexgen.memory.lanes import Cancelled, Done, HostDone, Job, Lane, ThreadLane, failure
from flexgen.memory.store import Store
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Step

_LIVE_EVENTS = 64
"""The number of jobs of a lane whose events are kept before the events of ended jobs are read."""


class EventDone:
    """The end of a job on a CUDA stream."""

    __slots__ = ("_event", "_lane", "_step")
    enqueued = True

    def __init__(self, event: torch.cuda.Event, step: Step, lane: LaneName) -> None:
        self._event = event
        self._step = step
        self._lane = lane

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as error:  # a kernel failed, in this job or in one before it on the device
            raise failure(self._step, self._lane, error) from error

    def precede(self, stream: Any) -> None:
        stream.wait_event(self._event)


class QueuedDone(HostDone):
    """The end of a job that a thread will enqueue on a CUDA stream. Its lock is released when the job is enqueued."""

    __slots__ = ("_on_stream",)
    _on_stream: Done

    def enqueue_as(self, done: Done) -> None:
        """The job is on its stream, and `done` is its end."""
        self._on_stream = done
        self.finish()

    def wait(self) -> None:
        super().wait()
        self._on_stream.wait()

    def precede(self, stream: Any) -> None:
        super().wait()
        self._on_stream.precede(stream)


class _Times:
    """The times of the jobs of one stream, from two events for each job.

    Events of ended jobs are read while the call runs, so that a long call keeps no more events than a short one. CUDA
    returns milliseconds as float32, whose values are 62 us apart after a quarter of an hour. So a start is measured
    from the previous start, and the time of a job between its own two events. At the end, the last start is measured
    back from the present time.
    """

    def __init__(self) -> None:
        self._live: deque[tuple[Step, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._read: list[tuple[Step, float, float]] = []  # start since the first one, and duration (s)
        self._last: tuple[float, torch.cuda.Event] | None = None  # the last start that was read

    def add(self, step: Step, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """The events of the next job, both recorded."""
        self._live.append((step, start, end))
        if len(self._live) >= _LIVE_EVENTS:
            # A failed device answers no query. The Done of a job reports the failure.
            with contextlib.suppress(RuntimeError):
                while self._live and self._live[0][2].query():
                    self._read_next()

    def _read_next(self) -> None:
        step, start, end = self._live[0]
        at = 0.0 if self._last is None else self._last[0] + self._last[1].elapsed_time(start) / 1e3
        self._read.append((step, at, start.elapsed_time(end) / 1e3))
        self._last = at, start
        self._live.popleft()

    def read(self, lane: LaneName, stream: torch.cuda.Stream, origin: float) -> list[Event]:
        """The events of all jobs, in seconds since `origin` (time.perf_counter). Waits for the end of the last one.

        Raises RuntimeError if the device has failed.
        """
        here = torch.cuda.Event(enable_timing=True)
        here.record(stream)
        here.synchronize()
        now = time.perf_counter() - origin
        while self._live:
            self._read_next()
        if self._last is None:
            return []
        at, start = self._last
        began = now - start.elapsed_time(here) / 1e3 - at
        return [Event(step, lane, began + at, began + at + took) for step, at, took in self._read]


class StreamLane(Lane):
    """A CUDA stream. Jobs only enqueue work, so the submitting thread runs them. Events order lanes on the device.

    The host blocks only for jobs of a thread that are not enqueued yet, because they have no event.
    """

    def __init__(self, name: LaneName, device: torch.device) -> None:
        super().__init__(name)
        self.stream = torch.cuda.Stream(device)
        self._times = _Times()

    def submit(self, job: Job, after: Sequence[Done], step: Step) -> Done:
        try:
            for other in after:
                other.precede(self.stream)
            start = torch.cuda.Event(enable_timing=True)
            # Host threads wait for it. Blocking events let them sleep, because host arithmetic needs the cores.
            end = torch.cuda.Event(enable_timing=True, blocking=True)
            with torch.cuda.stream(self.stream):
                start.record(self.stream)
                job()
                end.record(self.stream)
        except Exception as error:
            done = HostDone()
            done.finish(failure(step, self.name, error))
            return done
        self._times.add(step, start, end)
        return EventDone(end, step, self.name)

    def take_events(self, origin: float) -> list[Event]:
        taken, self._times = self._times, _Times()
        # After an error of the device, no event can be read. The Done of the failed job reports the error.
        with contextlib.suppress(RuntimeError):
            return taken.read(self.name, self.stream, origin)
        return []

    def drain(self) -> None:
        # The Done of its job reports a failed kernel. Here it only means that the stream is idle.
        with contextlib.suppress(RuntimeError):
            self.stream.synchronize()


class CopyLane(ThreadLane):
    """A link of a GPU: a lane on a CUDA stream, whose `submit` never blocks the caller.

    If all jobs that a job needs are already on streams, it is enqueued immediately, without a thread switch.
    Otherwise the lane's thread waits for the host work and then enqueues the job. The thread also enqueues all
    further jobs until it is idle, so that jobs reach the stream in submission order. Copies between the device and
    pageable memory block the thread that enqueues them. So the lane's thread enqueues all jobs while `host`, the
    store that they copy from and to, has pageable memory.

    The data of jobs needs no lock and no `record_stream`. A job may run later than its submission. It reads and
    changes the state of its slot on the host (`leaving` of `Activations`, `Slot.new`, `there` of `Lookup`). The next
    step that reads or replaces this state depends on this step, and its lane waits for the Done, which follows the
    job. The same step drops the tensors of the compute stream that a job reads. By then, that stream waits for the
    job's event, so later work on the stream can reuse the memory.
    """

    def __init__(self, name: LaneName, device: torch.device, host: Store | None = None) -> None:
        self._on_stream = StreamLane(name, device)
        self._host = host
        self._last: QueuedDone | None = None  # of the queue; None if it is known to be empty
        super().__init__(name, within=partial(torch.cuda.device, device))

    def submit(self, job: Job, after: Sequence[Done], step: Step) -> Done:
        if self._last is not None and self._last.enqueued:
            self._last = None
        blocks = self._host is not None and self._host.pageable
        idle = self._last is None and not self._cancelled
        if idle and not blocks and all(other.enqueued for other in after):
            return self._on_stream.submit(job, after, step)
        done = self._last = QueuedDone()
        self._enqueue(job, after, step, done)
        return done

    def _run(self, job: Job, after: Sequence[Done], step: Step, done: HostDone) -> None:
        assert isinstance(done, QueuedDone)
        try:
            for other in after:
                other.precede(self._on_stream.stream)
            if self._cancelled:
                raise Cancelled("an earlier step failed, or the caller gave up")
            done.enqueue_as(self._on_stream.submit(job, (), step))
        except BaseException as error:  # every error is reported through the Done
            done.finish(failure(step, self.name, error))

    def take_events(self, origin: float) -> list[Event]:
        return self._on_stream.take_events(origin)

    def drain(self) -> None:
        super().drain()
        self._last = None
        self._on_stream.drain()
