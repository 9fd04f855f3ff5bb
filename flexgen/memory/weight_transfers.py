"""Loads layers that are not stored on the compute device into slots there.

A layer moves in a few large copies: weights that are adjacent at home move as one `Cargo` into one of a few
preallocated slots. Each slot is large enough for the layers that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.layout.moves import Kind
from flexgen.layout.placement import Placement
from flexgen.layout.weight_slots import SlotSizes
from flexgen.layout.weights import WeightLayout
from flexgen.memory.cargo import Cargo, cargo_of
from flexgen.memory.disk import Read, ReadJob
from flexgen.memory.first_read import CheckedRanges, CheckedRead, Part
from flexgen.memory.homes import Homes
from flexgen.memory.lanes import Job
from flexgen.memory.machine import Machine
from flexgen.memory.store import tensor_at
from flexgen.memory.transfer import Chains, bind
from flexgen.models import WeightSpec
from flexgen.policy import Tier
from flexgen.units import ALIGNMENT, align


class WeightTransfers:
    """The slots, and for each layer the work that loads it into a slot.

    layers: the weights of each layer that are loaded completely.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[WeightSpec]],
        homes: Homes,
        sizes: SlotSizes,
        placement: Placement,
        machine: Machine,
    ) -> None:
        self._placement = placement
        self._device = machine.device
        self._io = machine.io
        self._cargo = [cargo_of(weights, homes) for weights in layers]
        self.layouts = [
            WeightLayout(tuple(cargo.run for cargo in of_layer), machine.device.topology)
            for of_layer in self._cargo
        ]
        self._offsets = [self._lay_out(cargo) for cargo in self._cargo]
        self.slots = [machine.device.memory.allocate(n, "weight slots") for n in sizes.device]
        self._staging = [machine.host.allocate(n, "staging of weights") for n in sizes.staging]
        self._chains: dict[tuple[int, int, int, int], Chains] = {}
        self._checked = CheckedRanges()

    def arrived(self, layer: int, slot: int) -> Iterator[tuple[WeightSpec, Tensor]]:
        """The layer's weights that are loaded, as views of the slot. An encoded weight is a view of its bytes."""
        for cargo, offset in zip(self._cargo[layer], self._offsets[layer], strict=True):
            for weight, place in cargo.weights:
                shape, dtype = weight.shape, weight.dtype_in(self._placement.dtype)
                if self._placement.codec(weight) is not None:
                    shape, dtype = (self._placement.stored_bytes(weight),), torch.uint8
                yield weight, tensor_at(self.slots[slot], offset + place, shape, dtype)

    def chains(self, layer: int, slot: int, piece: int, pieces: int) -> Chains:
        """The work that loads `piece` of `pieces` of the layer into the slot. Made once and used for every visit."""
        if not self._cargo[layer]:
            return ()
        key = (layer, slot, piece, pieces)
        if key not in self._chains:
            self._chains[key] = self._make_chains(*key)
        return self._chains[key]

    def _lay_out(self, all_cargo: Sequence[Cargo]) -> list[int]:
        """The offset of the weights of each cargo in a slot, in bytes."""
        offsets, end = [], 0
        for cargo in all_cargo:
            if self._device.shares_host_memory:  # the disk writes the whole aligned span into the slot
                offsets.append(end + cargo.lead)
                end += cargo.length
            else:
                # Weights of a file keep their alignment, so that each can be viewed as its dtype.
                offsets.append(end + cargo.lead % ALIGNMENT)
                end = align(offsets[-1] + cargo.end - cargo.lead, ALIGNMENT)
        return offsets

    def _make_chains(self, layer: int, slot: int, piece: int, pieces: int) -> Chains:
        all_cargo, offsets = self._cargo[layer], self._offsets[layer]
        copies: list[Callable[[], None]] = []
        reads: list[Read] = []
        parts: list[Part] = []
        staged: list[Callable[[], None]] = []
        staging_offsets, staging_end = [], 0
        for cargo in all_cargo:
            staging_offsets.append(staging_end)
            staging_end += 0 if isinstance(cargo.source, Tensor) else cargo.length
        for index, begin, end in self.layouts[layer].parts(piece, pieces):
            cargo, offset = all_cargo[index], offsets[index]
            if isinstance(cargo.source, Tensor):
                copies.append(self._copy(slot, offset + begin, cargo.source[begin:end]))
                continue
            if self._device.shares_host_memory:
                base, buffer = offset - cargo.lead, self.slots[slot]
            else:
                base, buffer = staging_offsets[index], self._staging[slot]
                first, last = max(begin, cargo.lead), min(end, cargo.end)
                if first < last:
                    payload = buffer[base + first : base + last]
                    staged.append(self._copy(slot, offset + first - cargo.lead, payload))
            path, start = cargo.source
            needed = min(end, cargo.end) - begin
            reads.append(Read(path, start + begin, buffer[base + begin : base + end], max(needed, 0)))
            parts += self._plain_parts(cargo, path, start, begin, end, buffer[base:])
        read = CheckedRead(ReadJob(self._io, reads), parts, self._checked)
        jobs: dict[tuple[Tier, Kind], Job] = {
            (Tier.CPU, Kind.COPY): partial(_run_all, copies),
            (Tier.DISK, Kind.READ): read,
            (Tier.DISK, Kind.COPY): partial(_run_all, staged),
        }
        return bind(self.layouts[layer].load(piece, pieces), lambda tier, move: jobs[tier, move.kind])

    def _plain_parts(
        self, cargo: Cargo, path: Path, start: int, begin: int, end: int, buffer: Tensor
    ) -> Iterator[Part]:
        """Values between `begin` and `end` of a cargo. `buffer` receives the bytes from `start` of its file."""
        for weight, place in cargo.weights:
            first = max(begin, cargo.lead + place)
            last = min(end, cargo.lead + place + self._placement.stored_bytes(weight))
            if first < last and self._placement.codec(weight) is None:
                dtype = weight.dtype_in(self._placement.dtype)
                yield Part(weight.key, path, start + first, buffer[first:last], dtype)

    def _copy(self, slot: int, offset: int, source: Tensor) -> Callable[[], None]:
        target = self.slots[slot][offset : offset + source.nbytes]
        return partial(self._device.to_device, target, source)


def _run_all(jobs: Sequence[Callable[[], None]]) -> None:
    for job in jobs:
        job()
