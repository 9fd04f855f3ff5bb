"""Bandwidths: of the link, the disk and host memory, by the calls and the lanes that the engine moves bytes with."""

from __future__ import annotations

import itertools
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
from flexgen.units import BLOCK

_STEP = Step(Op.LOAD_WEIGHTS, 0, 0, 0)
_JOBS = 64
"""In a row, to see what one of them takes beside its bytes."""
_HEADS, _PAGE_TOKENS, _WIDTH = 8, 128, 64
_ROW_BYTES = 2 * _HEADS * _PAGE_TOKENS * _WIDTH * torch.float16.itemsize
"""Of one row's keys and values in a page."""


class LinkProbe:
    """Moves bytes on the lanes of a machine; `close` gives back its buffers and its file."""

    def __init__(self, machine: Machine, lanes: Lanes, effort: Effort, watch: Stopwatch) -> None:
        self._machine = machine
        self._lanes = lanes
        self._watch = watch
        self._owned: list[tuple[Store, Tensor]] = []
        if effort.transfer < _ROW_BYTES or effort.transfer % BLOCK:
            raise ValueError(
                f"transfers of {effort.transfer} bytes: at least {_ROW_BYTES} are needed, a multiple of {BLOCK}"
            )
        self.transfer = effort.transfer
        self._pieces = max(effort.file // effort.transfer, 1)
        # Touched before they are read: pages that nobody wrote to are one page in the cache.
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
        """Give all back."""
        self._lanes.stop(cancel=True)
        for store, buffer in self._owned:
            store.release(buffer)
        self._owned.clear()
        if self._path is not None:
            self._machine.disk.release(self._path)
            self._path = None

    @property
    def file(self) -> Path:
        """A file that was written whole."""
        if self._path is None:
            self._path = self._machine.disk.scratch("probe", self._pieces * self.transfer)
            for n in range(self._pieces):
                self._machine.io.write([Write(self._path, n * self.transfer, self._host[0])])
        return self._path

    def jobs(
        self, lane: LaneName, nbytes: int | None = None, host: Sequence[Tensor] | None = None
    ) -> Callable[[int], Job]:
        """The n-th job of a lane, which moves `nbytes` (a transfer if None).

        `host`: buffers that a link moves from and to, in place of the probe's own.
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
        """Work that moves one transfer after another on its lane, whatever thread calls it, and waits for each.

        A GPU's lanes are streams: copies in the caller's own would queue with what that computes.
        """
        made, numbers, there = self.jobs(lane), itertools.count(), self._lanes[lane]

        def move() -> None:
            there.submit(made(next(numbers)), (), _STEP).wait()
            there.take_events(0.0)

        return move

    def _place(self, n: int) -> int:
        return n % self._pieces * self.transfer

    def _to_device(self, host: Tensor, size: int) -> None:
        self._machine.device.to_device(self._device[0][:size], host)

    def _from_device(self, host: Tensor, size: int) -> None:
        self._machine.device.from_device(host, self._device[0][:size])

    def _fill_pages(self, size: int) -> int:
        """New keys and values into half of a page of `size` bytes; returns how many bytes they were."""
        rows = max(min(size, self.transfer) // _ROW_BYTES, 1)
        page = tensor_at(self._host[0], 0, (2, rows, _HEADS, _PAGE_TOKENS, _WIDTH), torch.float16)
        fresh = tensor_at(self._host[1], 0, (2, rows, _HEADS, _PAGE_TOKENS // 2, _WIDTH), torch.float16)
        put([(page[0], page[1])], 0, fresh[0], fresh[1])
        return fresh.nbytes

    def pageable_bandwidth(self, lane: LaneName) -> float:
        """Bytes/s of long transfers of a link, from or to host memory that is not pinned."""
        if not self._pageable:
            self._pageable = [self._take(self._unpinned).fill_(1) for _ in range(2)]
        return self.bandwidth(lane, self._pageable)

    def bandwidth(self, lane: LaneName, host: Sequence[Tensor] | None = None) -> float:
        """Bytes/s of long transfers, one behind the other; `host` as in `jobs`."""
        made = self.jobs(lane, host=host)
        count = self._pieces
        seconds = self._watch.seconds(lambda: self._run([(lane, made(n), ()) for n in range(count)]))
        return count * self.transfer / seconds

    def host_copies(self) -> float:
        """Bytes/s at which the host brings new keys and values into pages, in a thread of its own."""
        return self._fill_pages(self.transfer) / self._watch.seconds(lambda: self._fill_pages(self.transfer))

    def latency(self, lanes: Sequence[LaneName], nbytes: int = BLOCK) -> float:
        """Seconds of one small job of `lanes` in turn, each behind the one before."""
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
