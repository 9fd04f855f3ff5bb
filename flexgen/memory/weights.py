"""Weights on their way: how a layer that does not live on the compute device reaches it.

A layer travels as a few large copies: what lies side by side at home moves as one `Cargo`. It lands in one of a
few preallocated slots, each big enough for any layer, and is used there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.memory.disk import BLOCK, Read, aligned_span
from flexgen.memory.homes import Homes, HostRegion
from flexgen.memory.machine import Machine
from flexgen.memory.placement import Placement
from flexgen.memory.store import ALIGNMENT, tensor_at
from flexgen.memory.transfer import Chain, Chains, Stage, cut
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Extent
from flexgen.policy import Tier
from flexgen.trace import LaneName
from flexgen.units import align

_GAP = 4 * BLOCK
"""Bytes of a file between two weights that are read along rather than skipped."""


@dataclass(frozen=True)
class SlotSizes:
    """Upper bounds, in bytes, of the buffers that one slot needs: known before anything is loaded."""

    device: int
    staging: int


def slot_sizes(
    layers: Sequence[Layer], placement: Placement, dtype: torch.dtype, shares_host_memory: bool
) -> SlotSizes:
    """What a slot must hold so that any layer fits.

    On a device that shares host memory only disk weights move, straight into the slot. Elsewhere they pass
    through a staging buffer in host memory.
    """

    def largest(*tiers: Tier) -> int:
        moving = ([w.nbytes(dtype) for w in layer.weights if placement.of(w) in tiers] for layer in layers)
        return max(sum(align(n, ALIGNMENT) + _GAP + 2 * BLOCK for n in sizes) for sizes in moving)

    if shares_host_memory:
        return SlotSizes(device=largest(Tier.DISK), staging=0)
    return SlotSizes(device=largest(Tier.CPU, Tier.DISK), staging=largest(Tier.DISK))


@dataclass(frozen=True)
class Cargo:
    """Bytes that travel together: `source[lead:]` holds weights, each at its offset from `lead`.

    The source is host memory, or an aligned span of a file whose first `lead` bytes only came along.
    """

    source: Tensor | tuple[Path, int]
    length: int
    lead: int
    end: int
    """Where the last weight ends, in bytes from the start of the source."""
    weights: tuple[tuple[WeightSpec, int], ...]


def cargo_of(layer: Layer, homes: Homes) -> list[Cargo]:
    """What has to move each time `layer` is visited."""
    in_host: dict[int, list[tuple[WeightSpec, HostRegion]]] = {}
    in_files: list[tuple[WeightSpec, Extent]] = []
    for weight in layer.weights:
        home = homes[weight]
        if isinstance(home, HostRegion):
            in_host.setdefault(home.buffer.data_ptr(), []).append((weight, home))
        elif isinstance(home, Extent):
            in_files.append((weight, home))
    return [_host_cargo(found) for found in in_host.values()] + _file_cargo(in_files)


def _host_cargo(found: list[tuple[WeightSpec, HostRegion]]) -> Cargo:
    begin = min(home.offset for _, home in found)
    end = max(home.offset + home.nbytes for _, home in found)
    places = tuple((weight, home.offset - begin) for weight, home in found)
    return Cargo(found[0][1].buffer[begin:end], end - begin, 0, end - begin, places)


def _file_cargo(found: list[tuple[WeightSpec, Extent]]) -> list[Cargo]:
    found = sorted(found, key=lambda pair: (str(pair[1].path), pair[1].offset))
    runs: list[list[tuple[WeightSpec, Extent]]] = []
    for weight, extent in found:
        if runs:
            before = runs[-1][-1][1]
            if before.path == extent.path and extent.offset - (before.offset + before.nbytes) <= _GAP:
                runs[-1].append((weight, extent))
                continue
        runs.append([(weight, extent)])
    cargo = []
    for run in runs:
        first, last = run[0][1], run[-1][1]
        nbytes = last.offset + last.nbytes - first.offset
        start, length, lead = aligned_span(first.offset, nbytes)
        places = tuple((weight, extent.offset - first.offset) for weight, extent in run)
        cargo.append(Cargo((first.path, start), length, lead, lead + nbytes, places))
    return cargo


class WeightSlots:
    """The slots, and for each layer the work that brings it into one and the tensors found there."""

    def __init__(
        self,
        layers: Sequence[Layer],
        homes: Homes,
        sizes: SlotSizes,
        dtype: torch.dtype,
        machine: Machine,
        count: int,
    ) -> None:
        self.count = count
        self._layers = layers
        self._homes = homes
        self._dtype = dtype
        self._device = machine.device
        self._io = machine.io
        self._cargo = [cargo_of(layer, homes) for layer in layers]
        self._device_offsets = [self._lay_out(cargo) for cargo in self._cargo]
        self._slots = [machine.device.memory.allocate(sizes.device, "weight slots") for _ in range(count)]
        self._staging = [machine.host.allocate(sizes.staging, "staging of weights") for _ in range(count)]
        self._chains: dict[tuple[int, int, int, int], Chains] = {}
        self._views: dict[tuple[int, int], Mapping[str, Tensor]] = {}

    @property
    def streaming(self) -> bool:
        """Whether any layer has to move."""
        return any(self._cargo)

    def moved_bytes(self, layer: int) -> int:
        """Bytes that move on each visit of the layer."""
        return sum(cargo.length for cargo in self._cargo[layer])

    def weights(self, layer: int, slot: int) -> Mapping[str, Tensor]:
        """The layer's weights by name, on the compute device; those that travel are views of the slot."""
        key = (layer, slot)
        if key not in self._views:
            homes = ((weight.name, self._homes[weight]) for weight in self._layers[layer].weights)
            views = {name: home for name, home in homes if isinstance(home, Tensor)}
            for cargo, offset in zip(self._cargo[layer], self._device_offsets[layer], strict=True):
                for weight, place in cargo.weights:
                    views[weight.name] = tensor_at(
                        self._slots[slot], offset + place, weight.shape, self._dtype
                    )
            self._views[key] = views
        return self._views[key]

    def chains(self, layer: int, slot: int, piece: int, pieces: int) -> Chains:
        """The work that brings `piece` of `pieces` of the layer into the slot; made once, used every visit."""
        if not self._cargo[layer]:
            return ()
        key = (layer, slot, piece, pieces)
        if key not in self._chains:
            self._chains[key] = self._make_chains(*key)
        return self._chains[key]

    def _lay_out(self, all_cargo: Sequence[Cargo]) -> list[int]:
        """Where in a slot the weights of each cargo begin, in bytes."""
        offsets, end = [], 0
        for cargo in all_cargo:
            if self._device.shares_host_memory:  # the disk writes the whole aligned span into the slot
                offsets.append(end + cargo.lead)
                end += cargo.length
            else:
                offsets.append(end)
                end = align(end + cargo.end - cargo.lead, ALIGNMENT)
        return offsets

    def _make_chains(self, layer: int, slot: int, piece: int, pieces: int) -> Chains:
        all_cargo, offsets = self._cargo[layer], self._device_offsets[layer]
        copies: list[Callable[[], None]] = []
        reads: list[Read] = []
        staged: list[Callable[[], None]] = []
        staging_offsets, staging_end = [], 0
        for cargo in all_cargo:
            staging_offsets.append(staging_end)
            staging_end += 0 if isinstance(cargo.source, Tensor) else cargo.length
        for index, begin, end in cut([cargo.length for cargo in all_cargo], piece, pieces, BLOCK):
            cargo, offset = all_cargo[index], offsets[index]
            if isinstance(cargo.source, Tensor):
                copies.append(self._copy(slot, offset + begin, cargo.source[begin:end]))
                continue
            if self._device.shares_host_memory:
                base, buffer = offset - cargo.lead, self._slots[slot]
            else:
                base, buffer = staging_offsets[index], self._staging[slot]
                first, last = max(begin, cargo.lead), min(end, cargo.end)
                if first < last:
                    payload = buffer[base + first : base + last]
                    staged.append(self._copy(slot, offset + first - cargo.lead, payload))
            path, start = cargo.source
            needed = min(end, cargo.end) - begin
            reads.append(Read(path, start + begin, buffer[base + begin : base + end], max(needed, 0)))
        chains: list[Chain] = []
        if copies:
            chains.append((Stage(LaneName.TO_DEVICE, partial(_run_all, copies)),))
        if reads:
            read = Stage(LaneName.DISK_READ, partial(self._io.read, reads))
            onward = (Stage(LaneName.TO_DEVICE, partial(_run_all, staged)),) if staged else ()
            chains.append((read, *onward))
        return tuple(chains)

    def _copy(self, slot: int, offset: int, source: Tensor) -> Callable[[], None]:
        target = self._slots[slot][offset : offset + source.nbytes]
        return partial(self._device.to_device, target, source)


def _run_all(jobs: Sequence[Callable[[], None]]) -> None:
    for job in jobs:
        job()
