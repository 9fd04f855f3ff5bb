"""The homes and moves of hidden states between layers.

Rows of the GPU tier stay on the compute device. On the CPU, rows of the CPU tier stay there too, and do not move.
The other rows are written to their home after each layer and loaded before the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.layout.hidden import HiddenLayout
from flexgen.layout.moves import Kind, Move
from flexgen.layout.plan import SLOTS
from flexgen.memory.disk import Read, ReadJob, Write
from flexgen.memory.lanes import Job
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.policy import Tier
from flexgen.runtime.cell import BoundCell


@dataclass
class _Slot:
    """Buffers of a cell for rows that move. `arriving` and `departing` are in host memory, between disk and link."""

    arriving: Tensor
    departing: Tensor
    device: Tensor
    leaving: Tensor | None = None
    """The layer's result until its rows have left."""


class Activations:
    """Hidden states (rows, tokens, hidden) of every batch of one block, between two layers."""

    @whole_or_closed
    def __init__(
        self,
        batches: Sequence[HiddenLayout],
        new: int,
        dtype: torch.dtype,
        machine: Machine,
        slots: int = SLOTS,
    ) -> None:
        """new: the maximum number of tokens of a row in a cell."""
        self._dtype = dtype
        self._device = machine.device
        self._io = machine.io
        self._taken = Taken()
        self.regroup(batches)
        self._homes: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}
        for batch, layout in enumerate(batches):
            cpu, disk = (layout.home_bytes(tier, new) for tier in (Tier.CPU, Tier.DISK))
            if cpu and not layout.topology.in_place(Tier.CPU):
                self._homes[batch] = self._take(machine.host, cpu)
            if disk:
                self._files[batch] = self._taken.file(machine.disk, f"hidden-{batch}", disk)
        from_disk = max(layout.home_bytes(Tier.DISK, new) for layout in batches)
        moved = max(layout.away_bytes(new) for layout in batches)
        self._slots = [self._make_slot(from_disk, moved, machine) for _ in range(slots)]

    def _make_slot(self, from_disk: int, moved: int, machine: Machine) -> _Slot:
        arriving, departing = (self._take(machine.host, from_disk) for _ in range(2))
        # Without a link, rows on disk are read to the memory in which they are used.
        shared = machine.device.shares_host_memory
        return _Slot(arriving, departing, arriving if shared else self._take(machine.device.memory, moved))

    def _take(self, store: Store, nbytes: int) -> Tensor:
        return self._taken.buffer(store, nbytes, "hidden states")

    def regroup(self, batches: Sequence[HiddenLayout]) -> None:
        """Continue with these batches. None may be larger than the first batch of its number.

        Call it only between two tokens, because it discards the hidden states between two layers.
        """
        self._batches = batches
        self.divide([(k, range(layout.count)) for k, layout in enumerate(batches)])

    def divide(self, cells: Sequence[tuple[int, range]]) -> None:
        """Continue with cells that compute these rows of these batches. Call it only between two tokens.

        Parts of a batch have no home of their own: all rows must stay on the device.
        """
        self._layouts = [self._batches[k].only(rows) for k, rows in cells]
        self._resident: list[Tensor | None] = [None] * len(cells)

    def close(self) -> None:
        """Release all memory and files."""
        self._taken.close()

    def moves(self, batch: int) -> bool:
        """Whether rows of the batch leave the device between two layers."""
        return bool(self._layouts[batch].away)

    def load(self, cell: BoundCell) -> Chains:
        """The work that loads the batch's rows that are not on the device to the cell's slot."""
        layout = self._layouts[cell.batch]
        return bind(layout.load(cell.span.new), partial(self._arrive, cell)) if layout.away else ()

    def _arrive(self, cell: BoundCell, tier: Tier, move: Move) -> Job:
        slot, begin = self._slots[cell.slot], 0
        if move.kind is Kind.READ:
            return ReadJob(self._io, [Read(self._files[cell.batch], 0, slot.arriving[: move.nbytes])])
        source = self._homes[cell.batch] if tier is Tier.CPU else slot.arriving
        if tier is Tier.DISK:  # after the rows of the CPU tier
            rows = self._layouts[cell.batch].rows
            begin = move.nbytes // len(rows[Tier.DISK]) * len(rows[Tier.CPU])
        return partial(
            self._device.to_device, slot.device[begin : begin + move.nbytes], source[: move.nbytes]
        )

    def take(self, cell: BoundCell) -> Tensor:
        """The batch's hidden states on the compute device, after `load`. The caller must not write to them."""
        on_device, layout = self._resident[cell.batch], self._layouts[cell.batch]
        if not layout.away:
            assert on_device is not None
            return on_device
        rows_away = sum(len(layout.rows[tier]) for tier in layout.away)
        shape = rows_away, cell.span.new, layout.token_bytes // self._dtype.itemsize
        away = tensor_at(self._slots[cell.slot].device, 0, shape, self._dtype)
        return away if on_device is None else torch.cat([on_device, away])

    def keep(self, cell: BoundCell, hidden: Tensor) -> None:
        """Accept a layer's result. The chains of `store` move the rows that must leave."""
        resident = self._layouts[cell.batch].resident
        if resident == hidden.shape[0]:
            self._resident[cell.batch] = hidden
            return
        # The slot keeps the result until its rows have left. The next user of the slot waits for that.
        self._slots[cell.slot].leaving = hidden
        self._resident[cell.batch] = hidden[:resident].clone() if resident else None

    def store(self, cell: BoundCell) -> Chains:
        """The work that moves the leaving rows to their home."""
        layout = self._layouts[cell.batch]
        return bind(layout.store(cell.span.new), partial(self._depart, cell)) if layout.away else ()

    def _depart(self, cell: BoundCell, tier: Tier, move: Move) -> Job:
        departing = self._slots[cell.slot].departing
        if move.kind is Kind.WRITE:
            return partial(self._io.write, [Write(self._files[cell.batch], 0, departing[: move.nbytes])])
        home = self._homes[cell.batch] if tier is Tier.CPU else departing
        return partial(self._leave, cell, tier, home[: move.nbytes])

    def _leave(self, cell: BoundCell, tier: Tier, target: Tensor) -> None:
        part, hidden = self._layouts[cell.batch].rows[tier], self._slots[cell.slot].leaving
        assert hidden is not None
        rows = hidden[part.start : part.stop]
        self._device.from_device(target.view(self._dtype).view(rows.shape), rows.contiguous())
