"""Where each weight lives: loaded to its tier once, when a model is opened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from flexgen.errors import CapacityError
from flexgen.layout.placement import Placement
from flexgen.layout.weights import lay_out
from flexgen.memory.conversions import SUFFIX, Conversions, converted_bytes
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Checkpoint, Extent
from flexgen.models.tensor_files import make_header, read_header
from flexgen.policy import Tier
from flexgen.units import ALIGNMENT, format_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostRegion:
    """A weight in host memory that is not the compute device's: `nbytes` from `offset` of `buffer`."""

    buffer: Tensor
    offset: int
    nbytes: int


Home = Tensor | HostRegion | Extent
"""A tensor in the compute device's memory, a region of host memory, or bytes of a file.

An encoded weight is its codec's bytes in all three.
"""


class Homes:
    """Gives every weight its home. Weights of one layer and tier lie side by side in one buffer.

    Disk weights stay in the checkpoint's own files where those hold them in the right dtype. Otherwise they are
    written once to the offload directory, in the same format, and later runs use them again (`Conversions`).

    Raises CheckpointError for what cannot be read and CapacityError where a store is too small.
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
        self._by_key: dict[str, Home] = {}

    def __getitem__(self, weight: WeightSpec) -> Home:
        return self._by_key[weight.key]

    def load(
        self, layers: Sequence[Layer], shown: Callable[[Sequence[Layer]], Iterable[Layer]] = iter
    ) -> None:
        """Bring every weight home. A tied head finds the embedding's tensor, laid out as a table, at home.

        shown: what the layers are taken through one by one, such as a progress bar.
        """
        by_layer = self._by_tier(layers)
        conversions = Conversions(self._disk, layers[0].spec.name, self._checkpoint)
        self._check_disk(layers, by_layer, conversions)
        for layer, new in zip(shown(layers), by_layer, strict=True):
            self._to_memory(layer, new[Tier.GPU], self._device.memory, on_device=True)
            self._to_memory(layer, new[Tier.CPU], self._host, on_device=self._device.shares_host_memory)
            self._to_disk(layer, new[Tier.DISK], conversions)

    def _by_tier(self, layers: Sequence[Layer]) -> list[dict[Tier, list[WeightSpec]]]:
        """The weights of each layer that no layer before it has."""
        seen, found = set(self._by_key), []
        for layer in layers:
            new: dict[Tier, list[WeightSpec]] = {tier: [] for tier in Tier}
            for weight in layer.weights:
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
        """Raise CapacityError if all that is to be written is more than the disk may take."""
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
                "or allowed: the checkpoint does not hold them as the policy wants them on disk. Give another "
                "offload_dir, a larger max_memory of the disk, a smaller disk share, or the checkpoint's own dtype"
            )

    def _to_memory(self, layer: Layer, weights: Sequence[WeightSpec], store: Store, on_device: bool) -> None:
        prelayout = self._device.prelayout(self._dtype) if on_device else None
        if prelayout is not None:
            multiplied = [
                w for w in weights if len(w.shape) == 2 and not w.looked_up and not self.placement.codec(w)
            ]
            for weight in multiplied:
                store.adopt(weight.nbytes(self._dtype), f"weights of {layer.name}")
                self._by_key[weight.key] = prelayout(self._checkpoint.read(weight, self._dtype))
            weights = [weight for weight in weights if weight not in multiplied]
        if not weights:
            return
        offsets, end = lay_out(weights, self.placement)
        buffer = store.allocate(end, f"weights of {layer.name}")
        for weight, offset in zip(weights, offsets, strict=True):
            for begin, kept in self._pieces(weight):
                buffer[offset + begin : offset + begin + kept.nbytes].copy_(kept)
            view = tensor_at(buffer, offset, *self._form(weight))
            self._by_key[weight.key] = view if on_device else HostRegion(buffer, offset, view.nbytes)

    def _form(self, weight: WeightSpec) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the weight as its tier keeps it: in the model's dtype, or the bytes of its codec."""
        if self.placement.codec(weight):
            return (self.placement.kept_bytes(weight),), torch.uint8
        return weight.shape, self._dtype

    def _pieces(self, weight: WeightSpec) -> Iterator[tuple[int, Tensor]]:
        """The weight as its tier keeps it, in bytes: where each piece of it begins, and the piece (uint8).

        Some rows at a time are read and encoded, so that a large vocabulary is never held beside what is kept of it.
        What lies between the pieces is zero.
        """
        codec = self.placement.codec(weight)
        count, width = weight.shape[0], weight.nbytes(self._dtype) // weight.shape[0]
        step = max(self._machine.device.topology.pieces.read_bytes // width, 1)
        for first in range(0, count, step):
            rows = range(first, min(first + step, count))
            tensor = self._checkpoint.read(weight, self._dtype, rows)
            if codec is None:
                yield first * width, tensor.flatten().view(torch.uint8)
                continue
            encoded = codec.encode(tensor)
            # Rows of each of the codec's parts follow one another.
            for (place, row), (begin, _) in zip(
                codec.rows(weight.shape), codec.rows(tensor.shape), strict=True
            ):
                yield place + first * row, encoded[begin : begin + len(rows) * row]

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
        """Where a file of the checkpoint holds the weight as it is needed."""
        return None if self.placement.codec(weight) else _in_place(self._checkpoint, weight, self._dtype)

    def _file_layout(
        self, weights: Sequence[WeightSpec]
    ) -> tuple[list[WeightSpec], bytes, dict[str, int], int]:
        """The weights as a file has them in order, its header, where each begins, and the bytes of the file."""
        # What is encoded comes first: it is as long as the alignment of its parts.
        ordered = sorted(weights, key=lambda weight: self.placement.codec(weight) is None)
        forms = {weight.key: self._form(weight)[::-1] for weight in ordered}
        header, offsets = make_header(forms, ALIGNMENT)
        return (
            ordered,
            header,
            offsets,
            max(offsets[w.key] + self.placement.kept_bytes(w) for w in ordered),
        )

    def _write(
        self, layer: Layer, weights: Sequence[WeightSpec], conversions: Conversions
    ) -> dict[str, Extent]:
        """Extents of weights that no file of the checkpoint holds as they are needed."""
        path = self._written(layer, weights, conversions)
        if path is None:
            ordered, header, offsets, nbytes = self._file_layout(weights)
            if self._disk.free < nbytes:
                raise CapacityError(
                    f"weights of {layer.name} need {format_bytes(nbytes)} in the offload directory, which has "
                    f"{format_bytes(self._disk.free)} free: give another offload_dir or a smaller disk share"
                )

            def write(file: BinaryIO) -> None:
                file.write(header)
                for weight in ordered:
                    for begin, kept in self._pieces(weight):
                        file.seek(offsets[weight.key] + begin)
                        file.write(memoryview(kept.numpy()))  # type: ignore[arg-type]
                file.truncate(nbytes)

            path = conversions.write(self._file_name(layer, weights), nbytes, write)
            logger.debug("wrote %s of %s to %s", format_bytes(nbytes), layer.name, path)
        entries = read_header(path)
        extents = {}
        for weight in weights:
            entry = entries[weight.key]
            extents[weight.key] = Extent(path, entry.offset, entry.nbytes, self._dtype, entry.shape)
        return extents

    def _written(self, layer: Layer, weights: Sequence[WeightSpec], conversions: Conversions) -> Path | None:
        """The file with these weights that an earlier run wrote, if there is one and it is undamaged."""
        _, header, _, nbytes = self._file_layout(weights)
        return conversions.find(self._file_name(layer, weights), header, nbytes)

    def _file_name(self, layer: Layer, weights: Sequence[WeightSpec]) -> str:
        """Another dtype, codec or choice of weights makes another file."""
        parts = [str(self._dtype)]
        parts += [f"{weight.key} {weight.shape} {self.placement.codec(weight)}" for weight in weights]
        return f"{layer.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}{SUFFIX}"


def stored_bytes(
    checkpoint: Checkpoint, layers: Sequence[Layer], dtype: torch.dtype, offload_dir: str | Path | None
) -> int:
    """Bytes of weights that would take no more of the disk if they were kept there: those that the checkpoint's files
    hold in `dtype`, and what earlier runs converted into `offload_dir`."""
    weights = {weight.key: weight for layer in layers for weight in layer.weights}
    extents = (_in_place(checkpoint, weight, dtype) for weight in weights.values())
    stored = sum(extent.nbytes for extent in extents if extent)
    if offload_dir is not None:
        stored += converted_bytes(layers[0].spec.name, checkpoint, offload_dir)
    return stored


def _in_place(checkpoint: Checkpoint, weight: WeightSpec, dtype: torch.dtype) -> Extent | None:
    """Where a file of the checkpoint holds the weight in `dtype`."""
    extent = checkpoint.extent(weight)
    # Data at an odd offset could not be viewed as its dtype; writers align, the format does not ask.
    return extent if extent and extent.dtype == dtype and extent.offset % dtype.itemsize == 0 else None
