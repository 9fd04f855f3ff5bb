"""The lanes of a GPU: CUDA streams. A job only enqueues, and events order the lanes on the device.

`StreamLane` is issued from the thread that submits. `CopyLane` serves a link and never blocks that thread: what has
to wait for host work first, such as a disk read, is enqueued by a thread of its own.
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
"""Jobs of a lane whose events are kept before those that have ended are read."""


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
    """The end of a job that a thread has yet to put on a CUDA stream; its lock tells that it is there."""

    __slots__ = ("_on_stream",)
    _on_stream: Done

    def enqueue_as(self, done: Done) -> None:
        """The job is on its stream, where `done` stands for it."""
        self._on_stream = done
        self.finish()

    def wait(self) -> None:
        super().wait()
        self._on_stream.wait()

    def precede(self, stream: Any) -> None:
        super().wait()
        self._on_stream.precede(stream)


class _Times:
    """When the jobs of one stream ran, from the two events of each.

    Events of jobs that have ended are read on the way, so that a long call has no more of them than a short one. CUDA
    counts in milliseconds of 24 bits, 62 us apart after a quarter of an hour. So a start is measured from the start
    before it, and what a job took between its own two events; at the end, the last start is counted back from now.
    """

    def __init__(self) -> None:
        self._live: deque[tuple[Step, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._read: list[tuple[Step, float, float]] = []  # seconds from the first start, and that it took
        self._last: tuple[float, torch.cuda.Event] | None = None  # the last start that was read

    def add(self, step: Step, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """The events of the next job, both recorded."""
        self._live.append((step, start, end))
        if len(self._live) >= _LIVE_EVENTS:
            # A device that has failed answers no query, which the Done of a job tells.
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
    """A CUDA stream. Jobs only enqueue, so they are issued inline; events order lanes on the device.

    The host blocks only for what has not been enqueued yet: a job of a thread, which has no event to wait for.
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
            # Host threads wait for it: asleep, since the cores are for the host's arithmetic.
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
        # After an error of the device no event can be read. The Done of the job that failed tells of it.
        with contextlib.suppress(RuntimeError):
            return taken.read(self.name, self.stream, origin)
        return []

    def drain(self) -> None:
        # A failed kernel is reported by the Done of its job; here it only means that the stream is idle.
        with contextlib.suppress(RuntimeError):
            self.stream.synchronize()


class CopyLane(ThreadLane):
    """A link of a GPU: a lane on a CUDA stream, whose `submit` never blocks the caller.

    While all that a job needs is on streams already, it is enqueued at once, without a thread hop. Otherwise the
    lane's thread waits for the host work and then enqueues it, and so it does with all that comes until it is idle
    again: jobs reach the stream in the order of their submission. Copies between the device and pageable memory
    block whoever enqueues them, so while `host`, the store that they move from and to, has any, all are the thread's.

    No lock and no `record_stream` is needed for what jobs use. A job may run later than its submission, and reads
    and changes what its slot holds on the host (`Activations._leaving`, `Slot.new`, `Lookup._there`): whoever reads
    or replaces that next is a step that needs this one, and its lane waits for the Done, which follows the job. The
    same step drops the tensors of the compute stream that a job reads, and by then that stream waits for the job's
    event: the memory is used again by what comes behind it on the stream.
    """

    def __init__(self, name: LaneName, device: torch.device, host: Store | None = None) -> None:
        self._on_stream = StreamLane(name, device)
        self._host = host
        self._last: QueuedDone | None = None  # of the queue, unless that is known to be empty
        super().__init__(name, within=partial(torch.cuda.device, device))

    def submit(self, job: Job, after: Sequence[Done], step: Step) -> Done:
        if self._last is not None and self._last.enqueued:
            self._last = None
        blocks = self._host is not None and self._host.pageable
        idle = self._last is None and not self._cancelled
        if idle and not blocks and all(other.enqueued for other in after):
            return self._on_stream.submit(job, after, step)
        done = self._last = QueuedDone()
        self._queue.put((job, after, step, done))
        return done

    def _run(self, job: Job, after: Sequence[Done], step: Step, done: HostDone) -> None:
        assert isinstance(done, QueuedDone)
        try:
            for other in after:
                other.precede(self._on_stream.stream)
            if self._cancelled:
                raise Cancelled("an earlier step failed, or the caller gave up")
            done.enqueue_as(self._on_stream.submit(job, (), step))
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            done.finish(failure(step, self.name, error))

    def take_events(self, origin: float) -> list[Event]:
        return self._on_stream.take_events(origin)

    def drain(self) -> None:
        super().drain()
        self._last = None
        self._on_stream.drain()
