"""The bandwidth of the link, the disk and host memory, measured with the lanes and calls of the engine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.memory.cpu import HostStore
from flexgen.memory.disk import Read, ReadJob, Write
from flexgen.memory.lanes import Done, Job, Lanes
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.probe.effort import Effort, Stopwatch
from flexgen.results.trace import LaneName
from flexgen.runtime.pages import put
from flexgen.schedule.steps import Op, Step
from flexgen.units import BLOCK, align

_STEP = Step(Op.LOAD_WEIGHTS, 0, 0, 0)
_JOBS = 64
"""The number of consecutive jobs that measure the fixed cost of one."""
_IN_A_ROW = 16
"""The number of reads in a row. A read that finds the disk idle is compared with their mean time."""
_MOVED = 4
"""The number of reads in a row that are one unit of work of `mover`."""
_WAITS = 32
"""The number of waits from which the start of a computation is measured."""
_HEADS, _PAGE_TOKENS, _WIDTH = 8, 128, 64
_ROW_BYTES = 2 * _HEADS * _PAGE_TOKENS * _WIDTH * torch.float16.itemsize
"""The bytes of one row's keys and values in a page."""


class LinkProbe:
    """Moves bytes on the lanes of a machine. `close` frees its buffers and its file."""

    def __init__(self, machine: Machine, lanes: Lanes, effort: Effort, watch: Stopwatch) -> None:
        self._machine = machine
        self._lanes = lanes
        self._watch = watch
        self._owned: list[tuple[Store, Tensor]] = []
        if effort.transfer < _ROW_BYTES or effort.transfer % BLOCK:
            raise ValueError(
                f"transfer is {effort.transfer} bytes; it must be a multiple of {BLOCK} and at least {_ROW_BYTES}"
            )
        self.transfer = effort.transfer
        self._start_bytes = align(effort.transfer // 4, BLOCK)
        self._pieces = max(effort.file // effort.transfer, 1)
        # Write before reading: all pages that were never written are mapped to one zero page, which stays cached.
        self._host = [self._take(machine.host).fill_(1) for _ in range(2)]
        self._unpinned = HostStore()
        self._pageable: list[Tensor] = []
        self._device = [] if machine.device.shares_host_memory else [self._take(machine.device.memory)]
        self._path: Path | None = None
        machine.device.settle()

    def _take(self, store: Store) -> Tensor:
        buffer = store.allocate(self.transfer, "the probe's transfers")
        self._owned.append((store, buffer))
        return buffer

    def close(self) -> None:
        """Free all buffers and the file."""
        self._lanes.stop(cancel=True)
        for store, buffer in self._owned:
            store.release(buffer)
        self._owned.clear()
        if self._path is not None:
            self._machine.disk.release(self._path)
            self._path = None

    @property
    def file(self) -> Path:
        """A file that was written completely."""
        if self._path is None:
            self._path = self._machine.disk.scratch("probe", self._pieces * self.transfer)
            for n in range(self._pieces):
                self._machine.io.write([Write(self._path, n * self.transfer, self._host[0])])
        return self._path

    def jobs(
        self, lane: LaneName, nbytes: int | None = None, host: Sequence[Tensor] | None = None
    ) -> Callable[[int], Job]:
        """A function that returns the n-th job of a lane. A job moves `nbytes`, or one transfer if None.

        host: host buffers for jobs of a link, in place of the probe's own.
        """
        size = self.transfer if nbytes is None else nbytes
        there = host or self._host
        match lane:
            case LaneName.TO_DEVICE:
                return lambda n: partial(self._to_device, there[n % 2][:size], size)
            case LaneName.FROM_DEVICE:
                return lambda n: partial(self._from_device, there[n % 2][:size], size)
            case LaneName.DISK_READ:
                return lambda n: ReadJob(
                    self._machine.io, [Read(self.file, self._place(n), self._host[n % 2][:size])]
                )
            case LaneName.DISK_WRITE:
                return lambda n: partial(
                    self._machine.io.write, [Write(self.file, self._place(n), self._host[n % 2][:size])]
                )
            case _:
                return lambda n: partial(self._fill_pages, size)

    def mover(self, lane: LaneName) -> Callable[[], object]:
        """Work that moves a few transfers on a lane and waits for them. Any thread may call it.

        The lanes of a GPU are streams. Copies in the caller's stream would wait for its computation. There are
        several reads, so that most of them start before the previous one ends. `start_of_read` measures the others.
        """
        made, numbers, there = self.jobs(lane), itertools.count(), self._lanes[lane]
        count = _MOVED if lane is LaneName.DISK_READ else 1

        def move() -> None:
            dones = [there.submit(made(next(numbers)), (), _STEP) for _ in range(count)]
            for done in dones:
                done.wait()
            there.take_events(0.0)

        return move

    def start_of_read(
        self,
        together: Callable[[Callable[[], float]], Sequence[float]],
        before: Callable[[], object],
        lost: float = 0.0,
    ) -> float:
        """The additional seconds of a read that finds the disk idle, compared with one of several reads in a row.

        The threads of such a read have to wake up, perhaps on cores that compute. In a row, they wake up while the
        previous read ends.

        together: calls the given function a few times and returns its results. Other work may run at the same time.
        before: runs before each read, long enough that these threads sleep.
        lost: the share of its rate that the disk loses through this work.
        """
        made, numbers = self.jobs(LaneName.DISK_READ, self._start_bytes), itertools.count()
        row = [(LaneName.DISK_READ, made(n), ()) for n in range(_IN_A_ROW)]
        in_a_row = self._watch.seconds(lambda: self._run(row)) / _IN_A_ROW

        def read() -> float:
            before()
            began = self._watch.clock()
            self._run([(LaneName.DISK_READ, made(next(numbers)), ())])
            return self._watch.clock() - began

        return max(statistics.mean(together(read)) - in_a_row / (1 - lost), 0.0)

    def start_of_computation(self, compute: Callable[[], object], in_flight: int) -> float:
        """The additional seconds of a computation after a wait for a read, compared with the one after it.

        During the wait, the threads of the computation sleep, and its code may leave the caches.

        compute: a computation; it returns at its end. in_flight: the number of further reads that are in flight then.
        """
        made, numbers = self.jobs(LaneName.DISK_READ), itertools.count()
        lane = self._lanes[LaneName.DISK_READ]

        def seconds() -> float:
            began = self._watch.clock()
            compute()
            return self._watch.clock() - began

        compute()
        later = []
        for _ in range(_WAITS):
            first, *others = [lane.submit(made(next(numbers)), (), _STEP) for _ in range(1 + in_flight)]
            first.wait()
            later.append(seconds() - seconds())
            self._wait(others)
        return max(statistics.mean(later), 0.0)

    def _place(self, n: int) -> int:
        return n % self._pieces * self.transfer

    def _to_device(self, host: Tensor, size: int) -> None:
        self._machine.device.to_device(self._device[0][:size], host)

    def _from_device(self, host: Tensor, size: int) -> None:
        self._machine.device.from_device(host, self._device[0][:size])

    def _fill_pages(self, size: int) -> int:
        """Write new keys and values to half of a page of `size` bytes, and return the number of bytes written."""
        rows = max(min(size, self.transfer) // _ROW_BYTES, 1)
        page = tensor_at(self._host[0], 0, (2, rows, _HEADS, _PAGE_TOKENS, _WIDTH), torch.float16)
        fresh = tensor_at(self._host[1], 0, (2, rows, _HEADS, _PAGE_TOKENS // 2, _WIDTH), torch.float16)
        put([(page[0], page[1])], 0, fresh[0], fresh[1])
        return fresh.nbytes

    def pageable_bandwidth(self, lane: LaneName) -> float:
        """Bytes/s of long transfers over a link, from or to host memory that is not pinned."""
        if not self._pageable:
            self._pageable = [self._take(self._unpinned).fill_(1) for _ in range(2)]
        return self.bandwidth(lane, self._pageable)

    def bandwidth(self, lane: LaneName, host: Sequence[Tensor] | None = None) -> float:
        """Bytes/s of long consecutive transfers. `host`: see `jobs`."""
        made = self.jobs(lane, host=host)
        count = self._pieces
        seconds = self._watch.seconds(lambda: self._run([(lane, made(n), ()) for n in range(count)]))
        return count * self.transfer / seconds

    def host_copies(self) -> float:
        """Bytes/s at which the host copies new keys and values to pages."""
        return self._fill_pages(self.transfer) / self._watch.seconds(lambda: self._fill_pages(self.transfer))

    def latency(self, lanes: Sequence[LaneName], nbytes: int = BLOCK) -> float:
        """Seconds of one small job in a sequence that alternates between `lanes`. Each waits for the one before."""
        made = [self.jobs(lane, nbytes) for lane in lanes]
        seconds = self._watch.seconds(lambda: self._in_a_row(lanes, made))
        return seconds / _JOBS

    def _in_a_row(self, lanes: Sequence[LaneName], made: Sequence[Callable[[int], Job]]) -> None:
        after: tuple[Done, ...] = ()
        for n, (lane, make) in zip(
            range(_JOBS), itertools.cycle(zip(lanes, made, strict=True)), strict=False
        ):
            after = (self._lanes[lane].submit(make(n), after, _STEP),)
        self._wait(after)

    def _run(self, work: Sequence[tuple[LaneName, Job, Sequence[Done]]]) -> None:
        self._wait([self._lanes[lane].submit(job, after, _STEP) for lane, job, after in work])

    def _wait(self, dones: Sequence[Done]) -> None:
        for done in dones:
            done.wait()
        self._lanes.take_events(0.0)
