"""Lanes. A lane runs its jobs in submission order; `submit` returns a `Done`.

If work only enqueues on a GPU (kernels, copies), a lane is a CUDA stream with events between lanes
(`stream_lanes`). If work blocks the host (disk, host arithmetic, the links of an emulated device), a lane is a
thread. If nothing runs at the same time, a lane is the calling thread. There is no device-wide synchronisation: a job
waits only for the jobs that its submission names.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import queue
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn, Protocol, Self

import torch

from flexgen.errors import LaneError
from flexgen.kernels.threads import take_no_others
from flexgen.memory import threads
from flexgen.memory.device_errors import lane_error
from flexgen.memory.taken import run_all
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Step

Job = Callable[[], object]


class Cancelled(Exception):
    """A job was dropped because an earlier one failed or the caller cancelled the call."""


class Done(Protocol):
    """The end of one job."""

    @property
    def enqueued(self) -> bool:
        """Whether `precede` returns immediately: the job has ended, or it is on a stream with an event at its end."""

    def wait(self) -> None:
        """Block the host until the job has ended. Raises LaneError if it or a job that it needs failed."""

    def precede(self, stream: Any) -> None:
        """Make a CUDA stream wait for the job. Blocks the host until the job is `enqueued`. Raises like `wait`."""


def failure(step: Step, lane: LaneName, cause: BaseException) -> LaneError:
    """A LaneError that names the step. An error of an earlier step keeps its name."""
    if isinstance(cause, LaneError):
        return cause
    what = (
        f"token {step.token}" if step.token >= 0 else f"a part of the prompts ({-step.token} before the last)"
    )
    where = f"{step.op.name.lower()} of {what}, layer {step.layer}, batch {step.batch}"
    return lane_error(f"{where} failed on lane {lane}", cause)


class Lane(ABC):
    """One resource that runs its jobs in submission order."""

    def __init__(self, name: LaneName) -> None:
        self.name = name

    def start(self) -> Self:
        """Start the lane's threads, if it has any. `Lanes` calls it; jobs run from then on."""
        return self

    @abstractmethod
    def submit(self, job: Job, after: Sequence[Done], step: Step) -> Done:
        """Queue `job`, to run after the jobs `after`. `step` names it in the trace and in errors. Never raises the
        job's errors: the Done reports them."""

    @abstractmethod
    def take_events(self, origin: float) -> list[Event]:
        """The events since the last call, in seconds since `origin` (time.perf_counter). The lane must be idle."""

    def cancel(self) -> None:  # noqa: B027 (not every lane has something to do here)
        """Drop queued and further jobs instead of running them, until `drain`."""

    def drain(self) -> None:  # noqa: B027 (not every lane has something to do here)
        """Wait until the lane is idle. Afterwards no job accesses a buffer. Does not raise."""

    def end(self) -> None:  # noqa: B027 (not every lane has something to do here)
        """Make the threads end after the jobs in their queues, without waiting for it. May be called if `start` was
        interrupted or not called."""

    def close(self) -> None:  # noqa: B027 (not every lane has something to do here)
        """Free the threads or the stream."""


class HostDone:
    """The end of a job that a host thread runs. It is only a lock, because a token needs thousands of them."""

    __slots__ = ("_error", "_lock")

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._lock.acquire()
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        self._error = error
        self._lock.release()

    @property
    def enqueued(self) -> bool:
        return not self._lock.locked()  # may be False for a moment while another thread waits

    def wait(self) -> None:
        with self._lock:  # acquired and released, so that other threads can wait too
            pass
        if self._error is not None:
            raise self._error

    def precede(self, stream: Any) -> None:
        self.wait()


class InlineLane(Lane):
    """Runs each job immediately in the submitting thread. Saves a thread switch if nothing runs at the same time."""

    def __init__(self, name: LaneName) -> None:
        super().__init__(name)
        self._events: list[Event] = []

    def submit(self, job: Job, after: Sequence[Done], step: Step) -> Done:
        done = HostDone()
        try:
            for other in after:
                other.wait()
            start = time.perf_counter()
            job()
            self._events.append(Event(step, self.name, start, time.perf_counter()))
        except Exception as error:
            done.finish(failure(step, self.name, error))
        else:
            done.finish()
        return done

    def take_events(self, origin: float) -> list[Event]:
        taken, self._events = self._events, []
        return [Event(s, lane, a - origin, b - origin) for s, lane, a, b in taken]


class ThreadLane(Lane):
    """A host thread with a queue. The thread is a daemon, so an unclosed lane never blocks the exit.

    beside_compute: whether the compute lane uses the same cores; then the lane uses one of them (`kernels.threads`).
    within: makes the context in which the thread runs, such as that of a GPU whose events its jobs wait for.
    """

    def __init__(
        self,
        name: LaneName,
        beside_compute: bool = False,
        within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        super().__init__(name)
        self._beside_compute = beside_compute
        self._within = within
        self._events: list[Event] = []
        # A job with the jobs to wait for, a mark for `drain`, or None at the end.
        self._queue: queue.SimpleQueue[tuple[Job, Sequence[Done], Step, HostDone] | HostDone | None]
        self._queue = queue.SimpleQueue()
        self._cancelled = False
        self._used = False  # since the last drain
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name=f"flexgen-{name}", daemon=True)

    def start(self) -> Self:
        threads.start(self._thread)
        return self

    def submit(self, job: Job, after: Sequence[Done], step: Step) -> Done:
        done = HostDone()
        self._enqueue(job, after, step, done)
        return done

    def _enqueue(self, job: Job, after: Sequence[Done], step: Step, done: HostDone) -> None:
        """Give the job to the thread."""
        self._used = True
        self._queue.put((job, after, step, done))

    def _serve(self) -> None:
        if self._beside_compute:
            take_no_others()
        with self._within(), torch.inference_mode():  # both apply to a thread, not to the process
            while (item := self._queue.get()) is not None:
                if isinstance(item, HostDone):
                    item.finish()
                else:
                    self._run(*item)
                del item  # an idle lane must not refer to a buffer

    def _run(self, job: Job, after: Sequence[Done], step: Step, done: HostDone) -> None:
        try:
            for other in after:
                other.wait()
            if self._cancelled:
                raise Cancelled("an earlier step failed, or the caller gave up")
            start = time.perf_counter()
            try:
                job()
            finally:
                if os.getpid() != self._process:
                    _end_fork(sys.exception())
            self._events.append(Event(step, self.name, start, time.perf_counter()))
        except BaseException as error:  # every error is reported through the Done
            done.finish(failure(step, self.name, error))
        else:
            done.finish()

    def take_events(self, origin: float) -> list[Event]:
        taken, self._events = self._events, []
        return [Event(s, lane, a - origin, b - origin) for s, lane, a, b in taken]

    def cancel(self) -> None:
        self._cancelled = True

    def drain(self) -> None:
        if self._used:  # to wake a thread takes as long as a step of a small model
            self._wait()
        self._cancelled = self._used = False

    def _wait(self) -> None:
        """Wait until all jobs have ended."""
        served = HostDone()
        self._queue.put(served)
        served.wait()

    def end(self) -> None:
        self._queue.put(None)

    def close(self) -> None:
        self.end()
        if self._thread.is_alive():
            self._thread.join()


def _end_fork(error: BaseException | None) -> NoReturn:
    """End a process that a job forked in a lane's thread, with the exit status of `error`.

    The fork has no thread that waits for the job or handles its error. So the process ends here without exit
    handlers, like the children of `multiprocessing`.
    """
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    if error is None:
        print("flexgen: a process that was forked from within a call cannot continue it", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(error.code, str):
        print(error.code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


class Lanes(Mapping[LaneName, Lane]):
    """Starts the lanes of one compute device. Two names may share a lane if one resource serves both.

    If a lane cannot be started, or Ctrl-C arrives before the caller has this object, the threads of the others end.
    """

    def __init__(self, lanes: Mapping[LaneName, Lane]) -> None:
        self._lanes = dict(lanes)
        self._process = os.getpid()
        try:
            for lane in self._distinct():
                lane.start()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        for lane in self._distinct():
            lane.end()

    def __del__(self) -> None:
        # Ctrl-C can arrive after `__init__`, before the caller has stored the object. Then nothing calls `close`.
        self._end()

    def __getitem__(self, name: LaneName) -> Lane:
        return self._lanes[name]

    def __iter__(self) -> Iterator[LaneName]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def _distinct(self) -> Iterable[Lane]:
        return {id(lane): lane for lane in self._lanes.values()}.values()

    def stop(self, cancel: bool) -> None:
        """Wait until every lane is idle. `cancel` drops the jobs that have not begun.

        Ctrl-C is raised after the wait and does not end it: the caller must not release memory that a job still
        fills, and the cancellation must not drop jobs of the next call. In a child that was forked from within a
        call, this does nothing: a fork does not copy the threads to wait for.
        """
        if os.getpid() != self._process:
            return
        if cancel:
            for lane in self._distinct():
                lane.cancel()
        raised: BaseException | None = None
        for lane in self._distinct():
            while True:
                try:
                    lane.drain()
                    break
                except BaseException as error:  # lanes raise no errors here: it comes from a signal handler
                    raised = error
        if raised is not None:
            raise raised

    def take_events(self, origin: float) -> list[Event]:
        """Events of all lanes since the last call, sorted by start."""
        events = [event for lane in self._distinct() for event in lane.take_events(origin)]
        return sorted(events, key=lambda event: event.start)

    def close(self) -> None:
        run_all([*(lane.close for lane in self._distinct()), partial(self.stop, cancel=True)])
        self._lanes.clear()
