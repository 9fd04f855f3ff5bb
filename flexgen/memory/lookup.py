"""Tables of which a cell reads a few rows: those are gathered where the table lies, and only they travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexgen.memory.direct_file import BLOCK
from flexgen.memory.disk import Read
from flexgen.memory.homes import Homes, HostRegion
from flexgen.memory.machine import Machine
from flexgen.memory.placement import Placement
from flexgen.memory.store import ALIGNMENT
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Extent
from flexgen.policy import Tier
from flexgen.trace import LaneName
from flexgen.units import KIB, MIB, align

_READ_ALONG = 64 * KIB
"""Bytes between two rows that are read along: a read of its own would take about as long."""
_SPAN = 1 * MIB
"""Bytes of one read at most, so that rows side by side are read by several threads."""
_SCRATCH = 16 * MIB
"""Bytes that are read at once at most; more rows are read in rounds."""


def gathered_table(layer: Layer, placement: Placement, shares_host_memory: bool) -> WeightSpec | None:
    """The layer's table, where it does not lie in the compute device's memory."""
    table = layer.table
    if table is None:
        return None
    in_place = (Tier.GPU, Tier.CPU) if shares_host_memory else (Tier.GPU,)
    return None if placement.of(table) in in_place else table


def travelling(layer: Layer, placement: Placement, shares_host_memory: bool) -> list[WeightSpec]:
    """The layer's weights that it gets whole, wherever they live."""
    table = gathered_table(layer, placement, shares_host_memory)
    return [weight for weight in layer.weights if weight is not table]


@dataclass(frozen=True)
class LookupSizes:
    """Bytes of the buffers for the rows that one cell looks up, `rows` of them at most.

    `slot`: of what reaches the compute device, the index of `tokens` ids and, from `lead`, the rows as they are
    kept. `staging`: of the same in host memory, before it crosses a link. `scratch`: of what is read at once.
    `decoded`: of the rows in the model's dtype, where they are kept encoded.
    """

    rows: int = 0
    lead: int = 0
    slot: int = 0
    staging: int = 0
    scratch: int = 0
    decoded: int = 0


def lookup_sizes(
    layers: Sequence[Layer], placement: Placement, shares_host_memory: bool, tokens: int
) -> LookupSizes:
    """What a batch of `tokens` ids takes; nothing where the table is in place."""
    table = gathered_table(layers[0], placement, shares_host_memory)
    if table is None:
        return LookupSizes()
    rows = min(tokens, table.shape[0])
    lead = align(tokens * torch.int64.itemsize, ALIGNMENT)
    slot = align(lead + kept_bytes(table, placement, rows), ALIGNMENT)
    scratch = 0
    if placement.of(table) is Tier.DISK:
        blocks = max(align(row, BLOCK) for _, row in _parts(table, placement, rows)) + BLOCK
        scratch = max(min(rows * (blocks + _READ_ALONG), _SCRATCH), blocks)
    decoded = rows * table.shape[1] * placement.dtype.itemsize if placement.codec(table) else 0
    return LookupSizes(rows, lead, slot, 0 if shares_host_memory else slot, scratch, decoded)


def _parts(table: WeightSpec, placement: Placement, rows: int) -> tuple[tuple[int, int], ...]:
    """(where row 0 begins, bytes of a row) of each part of a table of so many rows, as it is kept."""
    codec = placement.codec(table)
    if codec is not None:
        return codec.rows((rows, table.shape[1]))
    return ((0, table.shape[1] * placement.dtype.itemsize),)


def kept_bytes(table: WeightSpec, placement: Placement, rows: int) -> int:
    """Bytes of so many rows of a table as they are kept."""
    shape, codec = (rows, table.shape[1]), placement.codec(table)
    return codec.nbytes(shape) if codec else rows * table.shape[1] * placement.dtype.itemsize


def read_bytes(table: WeightSpec, placement: Placement, rows: np.ndarray, begin: int, scratch: int) -> int:
    """Bytes that `RowTable.gather` reads of a table on disk for these rows, ascending, each once.

    The table begins `begin` bytes into its file; at most `scratch` bytes are read at once.
    """
    return _read_bytes(_parts(table, placement, table.shape[0]), rows, begin, scratch)


def _read_bytes(parts: Sequence[tuple[int, int]], rows: np.ndarray, begin: int, scratch: int) -> int:
    total = 0
    for place, width in parts:
        offsets = begin + place + rows * width
        total += sum(span.end - span.start for spans in _rounds(offsets, width, scratch) for span in spans)
    return total


def even_read_bytes(table: WeightSpec, placement: Placement, count: int, scratch: int) -> int:
    """`read_bytes` of `count` rows that lie evenly in a table at the start of its file: what stands for ids that are
    not known."""
    return _even_read_bytes(tuple(_parts(table, placement, table.shape[0])), table.shape[0], count, scratch)


@lru_cache(maxsize=1024)
def _even_read_bytes(parts: tuple[tuple[int, int], ...], rows: int, count: int, scratch: int) -> int:
    return _read_bytes(parts, np.arange(count) * rows // count, 0, scratch)


class RowTable:
    """A table at home, off the compute device."""

    def __init__(self, weight: WeightSpec, layers: Sequence[Layer], homes: Homes, machine: Machine) -> None:
        home = homes[weight]
        assert not isinstance(home, Tensor), "what is on the device is used in place"
        self.weight = weight
        self.codec = homes.placement.codec(weight)
        self._layers = layers
        self._home: HostRegion | Extent = home
        self._placement = homes.placement
        self._shared = machine.device.shares_host_memory
        self._io = machine.io
        self.lane = LaneName.DISK_READ if isinstance(home, Extent) else LaneName.HOST
        """Of `gather`."""

    def sizes(self, tokens: int) -> LookupSizes:
        """Of the buffers for a batch of `tokens` ids."""
        return lookup_sizes(self._layers, self._placement, self._shared, tokens)

    def nbytes(self, rows: int) -> int:
        """Bytes of so many rows as they are kept."""
        return kept_bytes(self.weight, self._placement, rows)

    def gather(self, rows: Tensor, target: Tensor, scratch: Tensor) -> None:
        """Fill the first `nbytes(len(rows))` bytes of `target` (uint8) with these rows, a table of their own.

        rows (n,) int64: ascending, each once. `scratch` (uint8, at least `LookupSizes.scratch`) is written to.
        """
        there = _parts(self.weight, self._placement, self.weight.shape[0])
        here = _parts(self.weight, self._placement, len(rows))
        for (begin, nbytes), (place, _) in zip(there, here, strict=True):
            out = target[place : place + len(rows) * nbytes].view(len(rows), nbytes)
            if isinstance(self._home, Extent):
                self._read(rows.numpy(), self._home.offset + begin, out.numpy(), scratch)
            else:
                begin += self._home.offset
                part = self._home.buffer[begin : begin + self.weight.shape[0] * nbytes].view(-1, nbytes)
                torch.index_select(part, 0, rows, out=out)

    def _read(self, rows: np.ndarray, begin: int, out: np.ndarray, scratch: Tensor) -> None:
        """Rows of `out.shape[1]` bytes, of which row 0 begins `begin` bytes into the file."""
        assert isinstance(self._home, Extent)
        width = out.shape[1]
        offsets = begin + rows * width
        windows = np.lib.stride_tricks.sliding_window_view(scratch.numpy(), width)
        for spans in _rounds(offsets, width, scratch.numel()):
            places = [0, *accumulate(span.end - span.start for span in spans)]
            self._io.read(
                [
                    Read(
                        self._home.path,
                        span.start,
                        scratch[begin:end],
                        needed=int(offsets[span.last - 1]) + width - span.start,
                    )
                    for span, (begin, end) in zip(spans, pairwise(places), strict=True)
                ]
            )
            for span, place in zip(spans, places, strict=False):
                here = slice(span.first, span.last)
                out[here] = windows[offsets[here] - span.start + place]


class _Span(NamedTuple):
    """Whole blocks of a file, and the rows (of those asked for) that are in them."""

    start: int
    end: int
    first: int
    last: int


def _rounds(offsets: np.ndarray, width: int, room: int) -> Iterator[list[_Span]]:
    """Spans over rows of `width` bytes at ascending offsets, in rounds of at most `room` bytes.

    Where rows lie close together a span reads what is between them: of ids that cover much of a table it becomes
    one long read.
    """
    spans: list[_Span] = []
    filled = 0
    starts = (offsets // BLOCK * BLOCK).tolist()
    ends = (-(-(offsets + width) // BLOCK) * BLOCK).tolist()
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if spans:
            before = spans[-1]
            more = end - before.end
            if start - before.end <= _READ_ALONG and end - before.start <= _SPAN and filled + more <= room:
                spans[-1] = _Span(before.start, end, before.first, n + 1)  # of very many rows, so no _replace
                filled += more
                continue
        if filled + end - start > room:
            yield spans
            spans, filled = [], 0
        spans.append(_Span(start, end, n, n + 1))
        filled += end - start
    if spans:
        yield spans


def open_table(layers: Sequence[Layer], homes: Homes, machine: Machine) -> RowTable | None:
    """The first layer's table, where its rows are gathered at home."""
    weight = gathered_table(layers[0], homes.placement, machine.device.shares_host_memory)
    return None if weight is None else RowTable(weight, layers, homes, machine)
