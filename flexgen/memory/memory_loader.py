"""Loads the weights of a layer to a memory tier: it maps, reads or encodes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexgen.errors import FlexGenError
from flexgen.layout.weights import lay_out
from flexgen.memory.converted_layers import ConvertedLayers
from flexgen.memory.device import ComputeDevice
from flexgen.memory.known_finite import KnownFinite
from flexgen.memory.mapped_files import map_extents, prefaults
from flexgen.memory.parallel_reading import Workers, read_checked, staging
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.weight_forms import WeightForms
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Extent
from flexgen.models.plain_files import read_into

logger = logging.getLogger(__name__)

_LEAST_PIECES = 4
"""Pieces for each thread in a layer that several threads read. One or two pieces of each are in memory at a time."""


@dataclass(frozen=True)
class HostRegion:
    """A weight in host memory, on a compute device with separate memory: `nbytes` from `offset` of `buffer`."""

    buffer: Tensor
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Sources:
    """Where the weights of memory tiers come from.

    forms: the checkpoint, and the form of each weight.
    converted: the files of converted weights in the offload directory, or None if there is no such directory.
    finite: whether the weights in files of the checkpoint were checked by an earlier start.
    """

    forms: WeightForms
    converted: ConvertedLayers | None
    finite: KnownFinite


class MemoryLoader:
    """Loads weights of layers to stores.

    maps: whether weights on the device that a file has in their form are mapped. The others of a layer and store are
    contiguous in one buffer.
    """

    def __init__(self, sources: Sources, device: ComputeDevice, workers: Workers, maps: bool) -> None:
        self._forms = sources.forms
        self._converted = sources.converted
        self._finite = sources.finite
        self._device = device
        self._workers = workers
        self._maps = maps
        self.keeps = False
        """Whether converted weights are written to the offload directory, unless they are already there."""

    def load(
        self, layer: Layer, weights: Sequence[WeightSpec], store: Store, on_device: bool
    ) -> dict[str, Tensor | HostRegion]:
        """The homes of the weights by key. on_device: whether the store is the compute device's memory."""
        what, homes = f"weights of {layer.name}", dict[str, Tensor | HostRegion]()
        if on_device and (prelayout := self._device.prelayout(self._forms.dtype)):
            for weight in filter(self._multiplied, weights):
                store.adopt(weight.nbytes(self._forms.dtype), what)
                homes[weight.key] = prelayout(self._forms.checkpoint.read(weight, self._forms.dtype))
        weights = [weight for weight in weights if weight.key not in homes]
        to_convert = [weight for weight in weights if self._forms.in_checkpoint(weight) is None]
        kept = self._found(layer, to_convert)
        if on_device and self._maps:
            for weight, mapped in self._mapped(weights, kept):
                store.adopt(mapped.nbytes, what, cached=True)
                homes[weight.key] = tensor_at(mapped, 0, *self._forms.of(weight))
        weights = [weight for weight in weights if weight.key not in homes]
        if not weights:
            return homes
        offsets, end = lay_out(weights, self._forms.placement)
        buffer = store.allocate(end, what)
        placed = {
            weight.key: (weight, buffer[offset:]) for weight, offset in zip(weights, offsets, strict=True)
        }
        self._fill(placed, kept)
        for weight, offset in zip(weights, offsets, strict=True):
            view = tensor_at(buffer, offset, *self._forms.of(weight))
            homes[weight.key] = view if on_device else HostRegion(buffer, offset, view.nbytes)
        if self.keeps and to_convert and not kept:
            self._keep(layer, to_convert, {key: place for key, (_, place) in placed.items()})
        return homes

    def unkept_bytes(self, layer: Layer, weights: Sequence[WeightSpec], on_device: bool) -> int:
        """The bytes that `load` writes for these weights if it keeps converted weights."""
        laid_out = on_device and self._device.prelayout(self._forms.dtype) is not None
        to_convert = [
            weight
            for weight in weights
            if self._forms.in_checkpoint(weight) is None and not (laid_out and self._multiplied(weight))
        ]
        if self._converted is None or not to_convert or self._found(layer, to_convert):
            return 0
        return self._converted.nbytes(to_convert)

    def _multiplied(self, weight: WeightSpec) -> bool:
        """Whether products take the weight in a layout of their own, if they have one."""
        return len(weight.shape) == 2 and not (
            weight.looked_up or weight.dtype or self._forms.placement.codec(weight)
        )

    def _found(self, layer: Layer, weights: Sequence[WeightSpec]) -> dict[str, Extent]:
        """The extents of converted weights in a file of an earlier run, by key."""
        if self._converted is None or not weights:
            return {}
        return self._converted.find(layer, weights) or {}

    def _keep(self, layer: Layer, weights: Sequence[WeightSpec], placed: Mapping[str, Tensor]) -> None:
        """Write converted weights from their places in memory. A failure is logged, and no more are written."""
        assert self._converted is not None
        stored_bytes = self._forms.placement.stored_bytes

        def pieces(weight: WeightSpec) -> Iterator[tuple[int, Tensor]]:
            yield 0, placed[weight.key][: stored_bytes(weight)].cpu()

        try:
            self._converted.write(layer, weights, pieces)
        except FlexGenError as error:
            logger.warning("the weights that were converted are not kept for later starts: %s", error)
            self.keeps = False

    def _mapped(
        self, weights: Sequence[WeightSpec], kept: Mapping[str, Extent]
    ) -> Iterator[tuple[WeightSpec, Tensor]]:
        """The weights that files have in their form, and their mapped bytes (uint8)."""
        own = {w.key: extent for w in weights if (extent := self._forms.in_checkpoint(w)) is not None}
        mapped = map_extents({**own, **kept})
        if not self._finite.known:  # reading also reports errors that a mapping would raise as a signal
            self._workers.run(
                task
                for key in mapped
                if key in own
                for task in self._in_pieces(own[key], partial(_check, own[key], key))
            )
        paths = {key: extent.path for key, extent in {**own, **kept}.items()}
        self._workers.run(task for key, part in mapped.items() for task in prefaults(part, paths[key]))
        return ((weight, mapped[weight.key]) for weight in weights if weight.key in mapped)

    def _fill(self, placed: Mapping[str, tuple[WeightSpec, Tensor]], kept: Mapping[str, Extent]) -> None:
        """Write the weights to their places (uint8, from the begin of the weight on), by key.

        In host memory, all workers share the weights that can be read a few rows at a time, unless the layer is so
        small that the pieces in work would be a large part of it.
        """
        tasks = {
            key: list(self._tasks(weight, place, kept))
            for key, (weight, place) in placed.items()
            if place.device.type == "cpu"
        }
        nbytes = sum(placed[key][0].nbytes(self._forms.dtype) for key in tasks if tasks[key])
        if nbytes < _LEAST_PIECES * self._workers.count * self._forms.sizes.thread_bytes:
            tasks = {}
        self._workers.run(task for each in tasks.values() for task in each)
        for key, (weight, place) in placed.items():
            if not tasks.get(key):
                pieces = self._read(kept[key], key) if key in kept else self._forms.pieces(weight)
                for begin, piece in pieces:
                    place[begin : begin + piece.nbytes].copy_(piece)

    def _tasks(
        self, weight: WeightSpec, place: Tensor, kept: Mapping[str, Extent]
    ) -> Iterator[Callable[[], None]]:
        """Tasks that each read a part of a weight to its place; none if it cannot be read in parts."""
        if (extent := kept.get(weight.key)) is not None:
            yield from self._in_pieces(extent, partial(_copy, extent, weight.key, place))
        elif (values := self._forms.values_in_checkpoint(weight)) is not None:
            for rows in self._forms.row_ranges(weight, self._forms.sizes.thread_bytes):
                yield partial(self._forms.read_rows, weight, values, rows, place)

    def _in_pieces(self, extent: Extent, work: Callable[[int, int], None]) -> Iterator[Callable[[], None]]:
        """Tasks that call `work` with the first and last byte of each piece of the extent."""
        item = extent.dtype.itemsize
        step = max(self._forms.sizes.thread_bytes // item, 1) * item
        return (partial(work, n, min(n + step, extent.nbytes)) for n in range(0, extent.nbytes, step))

    def _read(self, extent: Extent, key: str) -> Iterator[tuple[int, Tensor]]:
        """The bytes of an extent, in pieces."""
        for begin in range(0, extent.nbytes, self._forms.sizes.read_bytes):
            piece = torch.empty(min(self._forms.sizes.read_bytes, extent.nbytes - begin), dtype=torch.uint8)
            read_into(memoryview(piece.numpy()), extent.path, extent.offset + begin, key)  # type: ignore[arg-type]
            yield begin, piece


def _check(extent: Extent, key: str, begin: int, end: int) -> None:
    read_checked(extent, key, begin, staging(end - begin))


def _copy(extent: Extent, key: str, place: Tensor, begin: int, end: int) -> None:
    """Read bytes of a converted weight, which was checked before it was written."""
    view = memoryview(place[begin:end].numpy())  # type: ignore[arg-type]
    read_into(view, extent.path, extent.offset + begin, key)
