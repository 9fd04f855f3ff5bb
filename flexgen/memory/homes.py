"""The homes of weights: each weight is loaded to its tier once, when a model is opened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from flexgen.errors import CapacityError
from flexgen.layout.placement import Placement
from flexgen.layout.weights import lay_out
from flexgen.memory.conversions import SUFFIX, Conversions, converted_bytes
from flexgen.memory.machine import Machine
from flexgen.memory.parallel_reading import Workers, read_checked, staging
from flexgen.memory.store import Store, tensor_at
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Checkpoint, Extent
from flexgen.models.headers import make_header, read_header
from flexgen.policy import Tier
from flexgen.units import ALIGNMENT, format_bytes

logger = logging.getLogger(__name__)

_LEAST_PIECES = 4
"""Pieces for each thread in a layer that several threads read. One or two pieces of each are in memory at a time."""


@dataclass(frozen=True)
class HostRegion:
    """A weight in host memory, on a compute device with separate memory: `nbytes` from `offset` of `buffer`."""

    buffer: Tensor
    offset: int
    nbytes: int


Home = Tensor | HostRegion | Extent
"""A tensor in the compute device's memory, a region of host memory, or bytes of a file.

An encoded weight is stored as the bytes of its codec in all three. Each tensor of a weight in the form of a quantized
checkpoint has a home of its own.
"""


class Homes:
    """Loads every weight to its home. Weights of one layer and tier are contiguous in one buffer.

    Weights on disk stay in the checkpoint's own files if these have the right dtype. Otherwise they are written once
    to the offload directory, in the same format, and later runs reuse them (`Conversions`).

    Raises CheckpointError if a file cannot be read, and CapacityError if a store is too small.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        dtype: torch.dtype,
        machine: Machine,
    ) -> None:
        self._checkpoint = checkpoint
        self.placement = placement
        self._dtype = dtype
        self._machine = machine
        self._device = machine.device
        self._host = machine.host
        self._disk = machine.disk
        self._pieces_of = machine.device.topology.pieces
        self._by_key: dict[str, Home] = {}

    def __getitem__(self, weight: WeightSpec) -> Home:
        return self._by_key[weight.key]

    def load(
        self, layers: Sequence[Layer], shown: Callable[[Sequence[Layer]], Iterable[Layer]] = iter
    ) -> None:
        """Load every weight to its home. A tied head uses the embedding's tensor, in the layout of a table.

        shown: a wrapper around the sequence of layers, such as a progress bar.
        """
        by_layer = self._by_tier(layers)
        conversions = Conversions(self._disk, layers[0].spec.name, self._checkpoint)
        self._check_disk(layers, by_layer, conversions)
        with Workers() as workers:
            for layer, new in zip(shown(layers), by_layer, strict=True):
                self._to_memory(layer, new[Tier.GPU], self._device.memory, True, workers)
                self._to_memory(layer, new[Tier.CPU], self._host, self._device.shares_host_memory, workers)
                self._to_disk(layer, new[Tier.DISK], conversions)

    def _by_tier(self, layers: Sequence[Layer]) -> list[dict[Tier, list[WeightSpec]]]:
        """The tensors of each layer that no earlier layer has."""
        seen, found = set(self._by_key), []
        for layer in layers:
            new: dict[Tier, list[WeightSpec]] = {tier: [] for tier in Tier}
            for weight in (part for each in layer.weights for part in self.placement.parts(each)):
                if weight.key not in seen:
                    seen.add(weight.key)
                    new[self.placement.of(weight)].append(weight)
            found.append(new)
        return found

    def _check_disk(
        self,
        layers: Sequence[Layer],
        by_layer: Sequence[dict[Tier, list[WeightSpec]]],
        conversions: Conversions,
    ) -> None:
        """Raise CapacityError if the weights to write exceed the limit of the disk."""
        nbytes = 0
        for layer, new in zip(layers, by_layer, strict=True):
            elsewhere = [weight for weight in new[Tier.DISK] if not self._in_place(weight)]
            if elsewhere and self._written(layer, elsewhere, conversions) is None:
                nbytes += self._file_layout(elsewhere)[-1]
        if nbytes:
            conversions.remove_stale()
        room = self._machine.limits()[Tier.DISK] if nbytes else None
        if room is not None and nbytes > room:
            raise CapacityError(
                f"weights need {format_bytes(nbytes)} in the offload directory, which has {format_bytes(room)} free "
                "or allowed: the checkpoint does not store them in the dtype or codec of the policy. "
                "Give another offload_dir, a larger disk limit (max_memory), a smaller disk share, or the "
                "checkpoint's own dtype"
            )

    def _to_memory(
        self,
        layer: Layer,
        weights: Sequence[WeightSpec],
        store: Store,
        on_device: bool,
        workers: Workers,
    ) -> None:
        prelayout = self._device.prelayout(self._dtype) if on_device else None
        if prelayout is not None:
            multiplied = [
                w
                for w in weights
                if len(w.shape) == 2 and not (w.looked_up or w.dtype or self.placement.codec(w))
            ]
            for weight in multiplied:
                store.adopt(weight.nbytes(self._dtype), f"weights of {layer.name}")
                self._by_key[weight.key] = prelayout(self._checkpoint.read(weight, self._dtype))
            weights = [weight for weight in weights if weight.key not in self._by_key]
        if not weights:
            return
        offsets, end = lay_out(weights, self.placement)
        buffer = store.allocate(end, f"weights of {layer.name}")
        self._fill(buffer, list(zip(weights, offsets, strict=True)), workers)
        for weight, offset in zip(weights, offsets, strict=True):
            view = tensor_at(buffer, offset, *self._form(weight))
            self._by_key[weight.key] = view if on_device else HostRegion(buffer, offset, view.nbytes)

    def _fill(self, buffer: Tensor, weights: Sequence[tuple[WeightSpec, int]], workers: Workers) -> None:
        """Write the weights to their offsets of a buffer.

        In host memory, all workers share the weights that can be read a few rows at a time, unless the layer is so
        small that the pieces in work would be a large part of it.
        """
        at_once = self._pieces_of.thread_bytes
        shared = [
            (weight, offset, extent)
            for weight, offset in weights
            if buffer.device.type == "cpu" and (extent := self._stored(weight)) is not None
        ]
        if sum(weight.nbytes(self._dtype) for weight, *_ in shared) < _LEAST_PIECES * workers.count * at_once:
            shared = []
        workers.run(
            partial(self._read_rows, weight, extent, rows, buffer[offset:])
            for weight, offset, extent in shared
            for rows in self._row_ranges(weight, at_once)
        )
        done = {weight.key for weight, *_ in shared}
        for weight, offset in weights:
            if weight.key not in done:
                for begin, piece in self._pieces(weight):
                    buffer[offset + begin : offset + begin + piece.nbytes].copy_(piece)

    def _read_rows(self, weight: WeightSpec, extent: Extent, rows: range, out: Tensor) -> None:
        """Read some rows of a weight and write them, in the form of its tier, to their place in `out`."""
        width = extent.nbytes // weight.shape[0]
        begin, nbytes = rows.start * width, len(rows) * width
        if self.placement.codec(weight) is None:
            read_checked(extent, weight.key, begin, out[begin : begin + nbytes])
            return
        buffer = staging(nbytes)
        read_checked(extent, weight.key, begin, buffer)
        tensor = buffer.view(extent.dtype).view(len(rows), *weight.shape[1:])
        for place, piece in self._encoded(weight, rows.start, tensor):
            out[place : place + piece.nbytes].copy_(piece)

    def _form(self, weight: WeightSpec) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype in which the tier stores the weight: its own, or those of the bytes of its codec."""
        if self.placement.codec(weight):
            return (self.placement.stored_bytes(weight),), torch.uint8
        return weight.shape, weight.dtype_in(self._dtype)

    def _pieces(self, weight: WeightSpec) -> Iterator[tuple[int, Tensor]]:
        """The bytes that the tier stores for the weight, in pieces: the offset of each piece, and the piece (uint8).

        A piece is read and encoded from a few rows at a time, so that a large vocabulary is never in memory in both
        forms. A matrix that files store as (in, out) or quantized is one piece. The bytes between the pieces are
        zero.
        """
        whole = self._checkpoint.encoded(weight) or weight.transposed  # every read takes all of it
        ranges = [range(weight.shape[0])] if whole else self._row_ranges(weight, self._pieces_of.read_bytes)
        width = weight.nbytes(self._dtype) // weight.shape[0]
        for rows in ranges:
            tensor = self._checkpoint.read(weight, self._dtype, rows)
            if self.placement.codec(weight) is None:
                yield rows.start * width, tensor.flatten().view(torch.uint8)
            else:
                yield from self._encoded(weight, rows.start, tensor)

    def _row_ranges(self, weight: WeightSpec, nbytes: int) -> Iterator[range]:
        """All rows of a weight, in ranges of about `nbytes` in the dtype of the model."""
        count, width = weight.shape[0], weight.nbytes(self._dtype) // weight.shape[0]
        step = max(nbytes // width, 1)
        return (range(first, min(first + step, count)) for first in range(0, count, step))

    def _encoded(self, weight: WeightSpec, first: int, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The bytes of the rows of `tensor`, which are rows of the weight from `first` on, in the weight's codec: the
        offset in the encoded weight of each piece, and the piece (uint8)."""
        codec = self.placement.codec(weight)
        assert codec is not None
        encoded = codec.encode(tensor)
        # The rows of each of the codec's parts are contiguous.
        for (place, row), (begin, _) in zip(codec.rows(weight.shape), codec.rows(tensor.shape), strict=True):
            yield place + first * row, encoded[begin : begin + len(tensor) * row]

    def _to_disk(self, layer: Layer, weights: Sequence[WeightSpec], conversions: Conversions) -> None:
        elsewhere = []
        for weight in weights:
            if extent := self._in_place(weight):
                self._by_key[weight.key] = extent
            else:
                elsewhere.append(weight)
        if elsewhere:
            self._by_key |= self._write(layer, elsewhere, conversions)

    def _in_place(self, weight: WeightSpec) -> Extent | None:
        """The extent of the weight in a file of the checkpoint, if it is stored there in the needed form."""
        return None if self.placement.codec(weight) else self._stored(weight)

    def _stored(self, weight: WeightSpec) -> Extent | None:
        """The extent of the weight in a file of the checkpoint, if it is stored there in the dtype of the model."""
        return _in_place(self._checkpoint, weight, self._dtype)

    def _file_layout(
        self, weights: Sequence[WeightSpec]
    ) -> tuple[list[WeightSpec], bytes, dict[str, int], int]:
        """The weights in the order of the file, its header, the offset of each weight, and the bytes of the file."""
        # Encoded weights come first: their size is a multiple of the alignment of their parts. The others follow by
        # the sizes of their values, so that each begins at a multiple of it.
        ordered = sorted(weights, key=self._order)
        forms = {weight.key: self._form(weight)[::-1] for weight in ordered}
        header, offsets = make_header(forms, ALIGNMENT)
        return (
            ordered,
            header,
            offsets,
            max(offsets[w.key] + self.placement.stored_bytes(w) for w in ordered),
        )

    def _order(self, weight: WeightSpec) -> tuple[bool, int]:
        return self.placement.codec(weight) is None, -weight.dtype_in(self._dtype).itemsize

    def _write(
        self, layer: Layer, weights: Sequence[WeightSpec], conversions: Conversions
    ) -> dict[str, Extent]:
        """Extents of the weights that no file of the checkpoint stores in the needed form."""
        path = self._written(layer, weights, conversions)
        if path is None:
            ordered, header, offsets, nbytes = self._file_layout(weights)
            if self._disk.free < nbytes:
                raise CapacityError(
                    f"weights of {layer.name} need {format_bytes(nbytes)} in the offload directory, but it has "
                    f"{format_bytes(self._disk.free)} free: give another offload_dir or a smaller disk share"
                )

            def write(file: BinaryIO) -> None:
                file.write(header)
                for weight in ordered:
                    for begin, piece in self._pieces(weight):
                        file.seek(offsets[weight.key] + begin)
                        file.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
                file.truncate(nbytes)

            path = conversions.write(self._file_name(layer, weights), nbytes, write)
            logger.debug("wrote %s of %s to %s", format_bytes(nbytes), layer.name, path)
        entries = read_header(path)
        extents = {}
        for weight in weights:
            entry = entries[weight.key]
            dtype = weight.dtype_in(self._dtype)
            extents[weight.key] = Extent(path, entry.offset, entry.nbytes, dtype, entry.shape)
        return extents

    def _written(self, layer: Layer, weights: Sequence[WeightSpec], conversions: Conversions) -> Path | None:
        """The undamaged file with these weights that an earlier run wrote, or None."""
        _, header, _, nbytes = self._file_layout(weights)
        return conversions.find(self._file_name(layer, weights), header, nbytes)

    def _file_name(self, layer: Layer, weights: Sequence[WeightSpec]) -> str:
        """A file name that depends on the dtype, the codec and the set of weights."""
        parts = [str(self._dtype)]
        parts += [f"{weight.key} {weight.shape} {self.placement.codec(weight)}" for weight in weights]
        return f"{layer.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}{SUFFIX}"


def stored_bytes(
    checkpoint: Checkpoint, layers: Sequence[Layer], dtype: torch.dtype, offload_dir: str | Path | None
) -> int:
    """Bytes of weights that the disk already stores: those in the checkpoint's files in `dtype`, and those that
    earlier runs converted to `offload_dir`."""
    weights = {weight.key: weight for layer in layers for weight in layer.weights}
    encoded = map(checkpoint.encoded, weights.values())
    parts = [part for each in encoded if each for part in each.parts]
    extents = (_in_place(checkpoint, weight, dtype) for weight in (*weights.values(), *parts))
    stored = sum(extent.nbytes for extent in extents if extent)
    if offload_dir is not None:
        stored += converted_bytes(layers[0].spec.name, checkpoint, offload_dir)
    return stored


def _in_place(checkpoint: Checkpoint, weight: WeightSpec, dtype: torch.dtype) -> Extent | None:
    """The extent of the weight in a file of the checkpoint that stores it in the dtype that a model of the dtype
    `dtype` needs, or None."""
    extent, dtype = checkpoint.extent(weight), weight.dtype_in(dtype)
    # torch cannot view data at an odd offset as its dtype. Writers align it, but the format does not require that.
    return extent if extent and extent.dtype == dtype and extent.offset % dtype.itemsize == 0 else None
