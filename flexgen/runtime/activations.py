"""Hidden states between layers: where each batch's rows wait, and how they travel.

Rows of the GPU tier stay on the compute device (on the CPU, those of the CPU tier too: nothing moves).
The others are written home after each layer and brought back before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.layout.hidden import hidden_layout
from flexgen.layout.moves import Kind, Move
from flexgen.layout.plan import SLOTS
from flexgen.memory.disk import Read, ReadJob, Write
from flexgen.memory.lanes import Job
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.models import ModelSpec
from flexgen.policy import Policy, Tier


class Activations:
    """Hidden states (rows, tokens, hidden) of every batch of one block, between two layers."""

    @whole_or_closed
    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        batches: Sequence[int],
        new: int,
        dtype: torch.dtype,
        machine: Machine,
        slots: int = SLOTS,
    ) -> None:
        """A cell has at most `new` tokens of each row."""
        self._hidden = spec.hidden_size
        self._dtype = dtype
        self._device = machine.device
        self._io = machine.io
        self._taken = Taken()
        self._layout_of = partial(hidden_layout, spec, policy, dtype=dtype, topology=machine.device.topology)
        self.regroup(batches)
        self._leaving: dict[int, Tensor] = {}  # by slot

        self._homes: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}
        for batch, layout in enumerate(self._layouts):
            cpu, disk = (layout.home_bytes(tier, new) for tier in (Tier.CPU, Tier.DISK))
            if cpu and not layout.topology.in_place(Tier.CPU):
                self._homes[batch] = self._take(machine.host, cpu)
            if disk:
                self._files[batch] = self._taken.file(machine.disk, f"hidden-{batch}", disk)
        from_disk = max(layout.home_bytes(Tier.DISK, new) for layout in self._layouts)
        moved = max(layout.away_bytes(new) for layout in self._layouts)
        self._arriving = [self._take(machine.host, from_disk) for _ in range(slots)]
        self._departing = [self._take(machine.host, from_disk) for _ in range(slots)]
        # Without a link, rows on disk arrive where they are used.
        shared = machine.device.shares_host_memory
        self._slots = [
            self._arriving[n] if shared else self._take(machine.device.memory, moved) for n in range(slots)
        ]

    def _take(self, store: Store, nbytes: int) -> Tensor:
        return self._taken.buffer(store, nbytes, "hidden states")

    def regroup(self, batches: Sequence[int]) -> None:
        """From here on, batches of these numbers of rows, none larger than the one of its number was at first.

        What is kept between two layers is forgotten, so this is for the time between two tokens.
        """
        self._layouts = [self._layout_of(rows) for rows in batches]
        self._kept: list[Tensor | None] = [None] * len(batches)

    def close(self) -> None:
        """Give back all memory and files."""
        self._taken.close()

    def load(self, batch: int, slot: int, tokens: int) -> Chains:
        """The work that brings the batch's rows that are away into `slot`."""
        return bind(self._layouts[batch].load(tokens), partial(self._arrive, batch, slot))

    def _arrive(self, batch: int, slot: int, tier: Tier, move: Move) -> Job:
        arriving, target = self._arriving[slot], self._slots[slot]
        if move.kind is Kind.READ:
            return ReadJob(self._io, [Read(self._files[batch], 0, arriving[: move.nbytes])])
        if tier is Tier.CPU:
            source, begin = self._homes[batch], 0
        else:
            source, begin = (
                arriving,
                move.nbytes // self._count(batch, Tier.DISK) * self._count(batch, Tier.CPU),
            )
        return partial(self._device.to_device, target[begin : begin + move.nbytes], source[: move.nbytes])

    def take(self, batch: int, slot: int, tokens: int) -> Tensor:
        """The batch's hidden states on the compute device, once `load` is done. Not to be written to."""
        kept, layout = self._kept[batch], self._layouts[batch]
        rows_away = sum(map(len, layout.rows.values())) - layout.resident
        if not rows_away:
            assert kept is not None
            return kept
        away = tensor_at(self._slots[slot], 0, (rows_away, tokens, self._hidden), self._dtype)
        return away if kept is None else torch.cat([kept, away])

    def keep(self, batch: int, slot: int, hidden: Tensor) -> None:
        """Accept a layer's result; rows that must leave do so by the chains of `store`."""
        resident = self._layouts[batch].resident
        if resident == len(hidden):
            self._kept[batch] = hidden
            return
        # Until its rows have left, the slot holds the result: the same slot's next user waits for that.
        self._leaving[slot] = hidden
        self._kept[batch] = hidden[:resident].clone() if resident else None

    def store(self, batch: int, slot: int, tokens: int) -> Chains:
        """The work that brings the rows that leave home."""
        return bind(self._layouts[batch].store(tokens), partial(self._depart, batch, slot))

    def _depart(self, batch: int, slot: int, tier: Tier, move: Move) -> Job:
        departing = self._departing[slot]
        if move.kind is Kind.WRITE:
            return partial(self._io.write, [Write(self._files[batch], 0, departing[: move.nbytes])])
        home = self._homes[batch] if tier is Tier.CPU else departing
        return partial(self._leave, batch, tier, slot, home[: move.nbytes])

    def _leave(self, batch: int, tier: Tier, slot: int, target: Tensor) -> None:
        part = self._layouts[batch].rows[tier]
        rows = self._leaving[slot][part.start : part.stop]
        self._device.from_device(target.view(self._dtype).view(rows.shape), rows.contiguous())

    def _count(self, batch: int, tier: Tier) -> int:
        return len(self._layouts[batch].rows[tier])
