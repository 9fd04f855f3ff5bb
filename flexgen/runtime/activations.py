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

from flexgen.layout.plan import SLOTS, activation_bytes
from flexgen.memory.disk import Read, ReadJob, Write
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chain, Chains, Stage
from flexgen.models import ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.trace import LaneName
from flexgen.units import BLOCK, align


class Activations:
    """Hidden states (rows, tokens, hidden) of every batch of one block, between two layers."""

    @whole_or_closed
    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        batches: Sequence[int],
        prompt_len: int,
        dtype: torch.dtype,
        machine: Machine,
        slots: int = SLOTS,
    ) -> None:
        self._hidden = spec.hidden_size
        self._dtype = dtype
        self._device = machine.device
        self._shared = machine.device.shares_host_memory
        self._io = machine.io
        self._taken = Taken()
        self._split = policy.activations
        self.regroup(batches)
        self._leaving: dict[int, Tensor] = {}  # by slot

        def size(rows: int) -> int:
            return activation_bytes(spec, rows, prompt_len, dtype)

        self._homes: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}
        for batch, parts in enumerate(self._parts):
            if parts[Tier.CPU] and not self._shared:
                self._homes[batch] = self._take(machine.host, size(len(parts[Tier.CPU])))
            if parts[Tier.DISK]:
                nbytes = size(len(parts[Tier.DISK]))
                self._files[batch] = self._taken.file(machine.disk, f"hidden-{batch}", nbytes)
        from_disk = max(size(len(parts[Tier.DISK])) for parts in self._parts)
        moved = max(size(rows - stay) for rows, stay in zip(batches, self._resident, strict=True))
        self._arriving = [self._take(machine.host, from_disk) for _ in range(slots)]
        self._departing = [self._take(machine.host, from_disk) for _ in range(slots)]
        self._slots = [
            self._arriving[n] if self._shared else self._take(machine.device.memory, moved)
            for n in range(slots)
        ]

    def _take(self, store: Store, nbytes: int) -> Tensor:
        return self._taken.buffer(store, nbytes, "hidden states")

    def regroup(self, batches: Sequence[int]) -> None:
        """From here on, batches of so many rows: none larger than the one of its number was at first.

        What is kept between two layers is forgotten, so this is for the time between two tokens.
        """
        self._parts = [self._split.rows(rows) for rows in batches]
        self._resident = [
            len(parts[Tier.GPU]) + (len(parts[Tier.CPU]) if self._shared else 0) for parts in self._parts
        ]
        self._kept: list[Tensor | None] = [None] * len(batches)

    def close(self) -> None:
        """Give back all memory and files."""
        self._taken.close()

    def load(self, batch: int, slot: int, tokens: int) -> Chains:
        """The work that brings the batch's rows that are away into `slot`."""
        chains: list[Chain] = []
        target, away = self._slots[slot], 0
        if self._parts[batch][Tier.CPU] and not self._shared:
            source = self._homes[batch][: self._bytes(batch, Tier.CPU, tokens)]
            copy = partial(self._device.to_device, target[: source.nbytes], source)
            chains.append((Stage(LaneName.TO_DEVICE, copy),))
            away = source.nbytes
        if self._parts[batch][Tier.DISK]:
            nbytes = self._bytes(batch, Tier.DISK, tokens)
            arriving = self._arriving[slot]
            read = Read(self._files[batch], 0, arriving[: align(nbytes, BLOCK)])
            chain: Chain = (Stage(LaneName.DISK_READ, ReadJob(self._io, [read])),)
            if not self._shared:
                copy = partial(self._device.to_device, target[away : away + nbytes], arriving[:nbytes])
                chain += (Stage(LaneName.TO_DEVICE, copy),)
            chains.append(chain)
        return tuple(chains)

    def take(self, batch: int, slot: int, tokens: int) -> Tensor:
        """The batch's hidden states on the compute device, once `load` is done. Not to be written to."""
        kept, parts = self._kept[batch], self._parts[batch]
        rows_away = sum(map(len, parts.values())) - self._resident[batch]
        if not rows_away:
            assert kept is not None
            return kept
        away = tensor_at(self._slots[slot], 0, (rows_away, tokens, self._hidden), self._dtype)
        return away if kept is None else torch.cat([kept, away])

    def keep(self, batch: int, slot: int, hidden: Tensor) -> None:
        """Accept a layer's result; rows that must leave do so by the chains of `store`."""
        resident = self._resident[batch]
        if resident == len(hidden):
            self._kept[batch] = hidden
            return
        # Until its rows have left, the slot holds the result: the same slot's next user waits for that.
        self._leaving[slot] = hidden
        self._kept[batch] = hidden[:resident].clone() if resident else None

    def store(self, batch: int, slot: int, tokens: int) -> Chains:
        """The work that brings the rows that leave home."""
        chains: list[Chain] = []
        if self._parts[batch][Tier.CPU] and not self._shared:
            target = self._homes[batch][: self._bytes(batch, Tier.CPU, tokens)]
            chains.append((Stage(LaneName.FROM_DEVICE, partial(self._leave, batch, Tier.CPU, slot, target)),))
        if self._parts[batch][Tier.DISK]:
            nbytes = self._bytes(batch, Tier.DISK, tokens)
            target = self._departing[slot][:nbytes]
            write = Write(self._files[batch], 0, self._departing[slot][: align(nbytes, BLOCK)])
            chains.append(
                (
                    # Without a link the copy is the host's: it makes the rows aligned for the disk.
                    Stage(
                        LaneName.HOST if self._shared else LaneName.FROM_DEVICE,
                        partial(self._leave, batch, Tier.DISK, slot, target),
                    ),
                    Stage(LaneName.DISK_WRITE, partial(self._io.write, [write])),
                )
            )
        return tuple(chains)

    def _leave(self, batch: int, tier: Tier, slot: int, target: Tensor) -> None:
        part = self._parts[batch][tier]
        rows = self._leaving[slot][part.start : part.stop]
        self._device.from_device(target.view(self._dtype).view(rows.shape), rows.contiguous())

    def _bytes(self, batch: int, tier: Tier, tokens: int) -> int:
        return len(self._parts[batch][tier]) * tokens * self._hidden * self._dtype.itemsize
