"""Weights on their way: how a layer that does not live on the compute device reaches it.

A layer travels as a few large copies: what lies side by side at home moves as one `Cargo`. It lands in one of a
few preallocated slots, each big enough for the layers that it serves, and is used there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.layout.moves import Kind
from flexgen.layout.placement import Placement
from flexgen.layout.rows import travelling
from flexgen.layout.weight_slots import GAP, SlotSizes, decoded_bytes, encoded_products
from flexgen.layout.weights import Run, WeightLayout
from flexgen.memory.disk import Read, ReadJob, aligned_span
from flexgen.memory.first_read import CheckedRead, Part
from flexgen.memory.homes import Homes, HostRegion
from flexgen.memory.lanes import Job
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.transfer import Chains, bind
from flexgen.models import Layer, Weights, WeightSpec
from flexgen.models.checkpoint import Extent
from flexgen.policy import Tier
from flexgen.quant import Codec
from flexgen.units import ALIGNMENT, align


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

    @property
    def run(self) -> Run:
        tier = Tier.CPU if isinstance(self.source, Tensor) else Tier.DISK
        return Run(tier, self.length, self.lead, self.end)


def cargo_of(weights: Sequence[WeightSpec], homes: Homes) -> list[Cargo]:
    """What has to move each time the layer of these weights is visited."""
    in_host: dict[int, list[tuple[WeightSpec, HostRegion]]] = {}
    in_files: list[tuple[WeightSpec, Extent]] = []
    for weight in weights:
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
            if before.path == extent.path and extent.offset - (before.offset + before.nbytes) <= GAP:
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


class _Room:
    """Where the matrices of one visit are decoded to: a buffer that a call makes when it first decodes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buffer: Tensor | None = None

    def take(self, nbytes: int) -> Tensor:
        """At least `nbytes`; what an earlier visit left there may be gone."""
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self.release()
            self._buffer = self._store.allocate(nbytes, "decoded weights")
        return self._buffer

    def place(self, nbytes: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where a matrix goes in a room of at least `nbytes`."""
        return tensor_at(self.take(nbytes), offset, shape, dtype)

    def release(self) -> None:
        if self._buffer is not None:
            self._store.release(self._buffer)
            self._buffer = None


class _Decoding:
    """An encoded weight in the model's dtype: decoded when a visit first asks for it."""

    def __init__(self, codec: Codec, kept: Tensor, make: Callable[[], Tensor]) -> None:
        self._codec = codec
        self._kept = kept
        self._make = make
        self._out: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._out is None:
            out = self._make()
            self._codec.decode(self._kept, out)
            self._out = out
        return self._out

    def forget(self) -> None:
        """What was decoded may be overwritten, or the slot holds other bytes."""
        self._out = None


@dataclass(frozen=True)
class _LayerViews:
    """A layer's weights as `WeightSlots.weights` gives them, and the decodings behind those that are encoded."""

    weights: Weights
    decodings: tuple[_Decoding, ...]


class WeightSlots:
    """The slots, and for each layer the work that brings it into one and the tensors found there.

    Nothing in it refers back to it: slots and weights are freed with the last reference from outside, and need not
    wait for Python's collector.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        homes: Homes,
        sizes: SlotSizes,
        placement: Placement,
        machine: Machine,
        decoded: int = 1,
    ) -> None:
        """`decoded`: how many layers are computed by turns, each with decoded weights of its own."""
        self.turns = sizes.turns
        self._homes = homes
        self.placement = placement
        self._device = machine.device
        self._io = machine.io
        self._layers = [travelling(layer, placement, machine.device.topology) for layer in layers]
        self._cargo = [cargo_of(weights, homes) for weights in self._layers]
        self.layouts = [
            WeightLayout(tuple(cargo.run for cargo in of_layer), machine.device.topology)
            for of_layer in self._cargo
        ]
        self._device_offsets = [self._lay_out(cargo) for cargo in self._cargo]
        self._slots = [machine.device.memory.allocate(n, "weight slots") for n in sizes.device]
        self._staging = [machine.host.allocate(n, "staging of weights") for n in sizes.staging]
        # Room for any layer but the last one, which computes so few tokens that it mostly decodes nothing.
        self._products = [encoded_products(layer, placement) for layer in layers]
        self._decoded_bytes = [decoded_bytes(layer, placement) for layer in layers]
        self._usual = max(self._decoded_bytes[:-1], default=0)
        self._rooms = [_Room(machine.device.memory) for _ in range(decoded)]
        self._decoded_for: list[object] = [None] * decoded  # the visit that each serves; none yet
        self._decodings: list[tuple[_Decoding, ...]] = [()] * decoded  # of that visit
        self._next_decoded = 0
        self._chains: dict[tuple[int, int, int, int], Chains] = {}
        self._checked: set[tuple[str, int, int]] = set()
        self._views: dict[tuple[int, int, int], _LayerViews] = {}

    def weights(self, layer: int, slot: int, visit: object) -> Weights:
        """The layer's weights by name, on the compute device; those that travel are views of the slot. A table
        whose rows are gathered at home is not among them.

        Tensors, and a `QuantizedMatrix` for what is encoded. A product of many rows has its matrix decoded, as part
        of the computation, once for each `visit` of the layer: the batches of a visit share the result.
        """
        known = visit in self._decoded_for
        place = self._decoded_for.index(visit) if known else self._next_decoded
        key = (layer, slot, place)
        if key not in self._views:
            self._views[key] = self._view(*key)
        views = self._views[key]
        if not known:
            self._forget(place)
            self._decoded_for[place], self._decodings[place] = visit, views.decodings
            self._next_decoded = (place + 1) % len(self._rooms)
        return views.weights

    def _forget(self, place: int) -> None:
        for decoding in self._decodings[place]:
            decoding.forget()
        self._decoded_for[place], self._decodings[place] = None, ()

    def release_decoded(self) -> None:
        """Give back what was decoded to, once nothing computes."""
        for place, room in enumerate(self._rooms):
            self._forget(place)
            room.release()

    def _view(self, layer: int, slot: int, decoded: int) -> _LayerViews:
        kept: dict[str, Tensor] = {}
        for weight in self._layers[layer]:
            home = self._homes[weight]
            if isinstance(home, Tensor):
                kept[weight.name] = home
        for cargo, offset in zip(self._cargo[layer], self._device_offsets[layer], strict=True):
            for weight, place in cargo.weights:
                encoded = self.placement.codec(weight) is not None
                shape = (self.placement.kept_bytes(weight),) if encoded else weight.shape
                dtype = torch.uint8 if encoded else self.placement.dtype
                kept[weight.name] = tensor_at(self._slots[slot], offset + place, shape, dtype)
        weights: dict[str, Tensor | QuantizedMatrix] = dict(kept)
        decodings, end = [], 0
        room = max(self._usual, self._decoded_bytes[layer])
        for weight in self._layers[layer]:
            if codec := self.placement.codec(weight):
                # Of a table rows are read as they are kept: it is never asked for.
                make = partial(torch.empty, weight.shape, dtype=self.placement.dtype)
                if weight in self._products[layer]:
                    place_in = self._rooms[decoded].place
                    make = partial(place_in, room, end, weight.shape, self.placement.dtype)
                    end = align(end + weight.nbytes(self.placement.dtype), ALIGNMENT)
                decodings.append(_Decoding(codec, kept[weight.name], make))
                weights[weight.name] = codec.matrix(
                    kept[weight.name], weight.shape, self.placement.dtype, decodings[-1]
                )
        return _LayerViews(weights, tuple(decodings))

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
            parts += self._plain_parts(cargo, path, start, begin, end, buffer[base:])
        read = CheckedRead(ReadJob(self._io, reads), parts, self.placement.dtype, self._checked)
        jobs: dict[tuple[Tier, Kind], Job] = {
            (Tier.CPU, Kind.COPY): partial(_run_all, copies),
            (Tier.DISK, Kind.READ): read,
            (Tier.DISK, Kind.COPY): partial(_run_all, staged),
        }
        return bind(self.layouts[layer].load(piece, pieces), lambda tier, move: jobs[tier, move.kind])

    def _plain_parts(
        self, cargo: Cargo, path: Path, start: int, begin: int, end: int, buffer: Tensor
    ) -> Iterator[Part]:
        """Values between `begin` and `end` of a cargo, whose bytes from `start` of its file come into `buffer`."""
        for weight, place in cargo.weights:
            first = max(begin, cargo.lead + place)
            last = min(end, cargo.lead + place + self.placement.kept_bytes(weight))
            if first < last and self.placement.codec(weight) is None:
                yield Part(weight.key, path, start + first, buffer[first:last])

    def _copy(self, slot: int, offset: int, source: Tensor) -> Callable[[], None]:
        target = self._slots[slot][offset : offset + source.nbytes]
        return partial(self._device.to_device, target, source)


def _run_all(jobs: Sequence[Callable[[], None]]) -> None:
    for job in jobs:
        job()
