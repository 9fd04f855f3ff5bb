"""Lookups in an embedding table off the compute device: the rows are gathered at home, and only these rows move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from flexgen.layout.moves import Kind, Move, Route, Routes
from flexgen.layout.placement import Placement
from flexgen.layout.topology import Topology
from flexgen.models import Layer, WeightSpec
from flexgen.policy import Tier
from flexgen.results.trace import LaneName
from flexgen.units import ALIGNMENT, BLOCK, KIB, MIB, align

_READ_ALONG = 64 * KIB
"""The maximum gap in bytes that one read covers between two rows: a separate read would take about as long."""
_SPAN = 1 * MIB
"""The maximum bytes of one read, so that several threads read adjacent rows."""
_SCRATCH = 16 * MIB
"""The maximum bytes that are read at once. More rows are read in rounds."""


def gathered_table(layer: Layer, placement: Placement, topology: Topology) -> WeightSpec | None:
    """The layer's embedding table, or None if the compute device uses it in place."""
    table = layer.table
    if table is None:
        return None
    return None if topology.in_place(placement.of(table)) else table


def whole_weights(layer: Layer, placement: Placement, topology: Topology) -> list[WeightSpec]:
    """The layer's weights that it uses completely, on any tier."""
    table = gathered_table(layer, placement, topology)
    return [weight for weight in layer.weights if weight is not table]


def moved_tensors(layer: Layer, placement: Placement, topology: Topology) -> list[WeightSpec]:
    """The tensors of `whole_weights`: several for a weight in the form of a quantized checkpoint."""
    return [part for weight in whole_weights(layer, placement, topology) for part in placement.parts(weight)]


@dataclass(frozen=True)
class LookupSizes:
    """Bytes of the buffers for the rows that one cell looks up, at most `rows`.

    `slot`: the buffer on the compute device for the index of `tokens` ids and, from `lead`, the rows in their stored
    form. `staging`: the same data in host memory, before it crosses a link. `scratch`: the buffer for reads.
    `decoded`: the rows in the model's dtype, if they are encoded.
    """

    rows: int = 0
    lead: int = 0
    slot: int = 0
    staging: int = 0
    scratch: int = 0
    decoded: int = 0


def lookup_sizes(
    layers: Sequence[Layer], placement: Placement, topology: Topology, tokens: int
) -> LookupSizes:
    """The sizes for a batch of `tokens` ids, or zero if the table is used in place."""
    table = gathered_table(layers[0], placement, topology)
    if table is None:
        return LookupSizes()
    rows = min(tokens, table.shape[0])
    lead = align(tokens * torch.int64.itemsize, ALIGNMENT)
    slot = align(lead + stored_row_bytes(table, placement, rows), ALIGNMENT)
    scratch = 0
    if placement.of(table) is Tier.DISK:
        blocks = max(align(row, BLOCK) for _, row in row_parts(table, placement, rows)) + BLOCK
        scratch = max(min(rows * (blocks + _READ_ALONG), _SCRATCH), blocks)
    decoded = rows * table.shape[1] * placement.dtype.itemsize if placement.codec(table) else 0
    return LookupSizes(rows, lead, slot, 0 if topology.shares_host_memory else slot, scratch, decoded)


def row_parts(table: WeightSpec, placement: Placement, rows: int) -> tuple[tuple[int, int], ...]:
    """(offset of row 0, bytes per row) for each part of a table with `rows` rows, in its stored form."""
    codec = placement.codec(table)
    if codec is not None:
        return codec.rows((rows, table.shape[1]))
    return ((0, table.shape[1] * placement.dtype.itemsize),)


def stored_row_bytes(table: WeightSpec, placement: Placement, rows: int) -> int:
    """Bytes of `rows` rows of a table in their stored form."""
    shape, codec = (rows, table.shape[1]), placement.codec(table)
    return codec.nbytes(shape) if codec else rows * table.shape[1] * placement.dtype.itemsize


def read_bytes(table: WeightSpec, placement: Placement, rows: np.ndarray, begin: int, scratch: int) -> int:
    """Bytes that `RowTable.gather` reads from a table on disk for these rows, which are ascending and unique.

    The table begins at byte `begin` of its file; at most `scratch` bytes are read at once.
    """
    return _read_bytes(row_parts(table, placement, table.shape[0]), rows, begin, scratch)


def _read_bytes(parts: Sequence[tuple[int, int]], rows: np.ndarray, begin: int, scratch: int) -> int:
    total = 0
    for place, width in parts:
        offsets = begin + place + rows * width
        total += sum(
            span.end - span.start for spans in read_rounds(offsets, width, scratch) for span in spans
        )
    return total


def even_read_bytes(table: WeightSpec, placement: Placement, count: int, scratch: int) -> int:
    """An estimate of `read_bytes` for unknown ids: `count` rows that are spread evenly over a table at the start of
    its file."""
    return _even_read_bytes(
        tuple(row_parts(table, placement, table.shape[0])), table.shape[0], count, scratch
    )


@lru_cache(maxsize=1024)
def _even_read_bytes(parts: tuple[tuple[int, int], ...], rows: int, count: int, scratch: int) -> int:
    return _read_bytes(parts, np.arange(count) * rows // count, 0, scratch)


class RowSpan(NamedTuple):
    """Whole blocks of a file, and the requested rows in them."""

    start: int
    end: int
    first: int
    last: int


def read_rounds(offsets: np.ndarray, width: int, room: int) -> Iterator[list[RowSpan]]:
    """Spans over rows of `width` bytes at ascending offsets, in rounds of at most `room` bytes.

    If rows are close together, a span includes the bytes between them. Ids that cover much of a table become one long
    read.
    """
    spans: list[RowSpan] = []
    filled = 0
    starts = (offsets // BLOCK * BLOCK).tolist()
    ends = (-(-(offsets + width) // BLOCK) * BLOCK).tolist()
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if spans:
            before = spans[-1]
            more = end - before.end
            if start - before.end <= _READ_ALONG and end - before.start <= _SPAN and filled + more <= room:
                spans[-1] = RowSpan(
                    before.start, end, before.first, n + 1
                )  # avoids _replace, which is slow for many rows
                filled += more
                continue
        if filled + end - start > room:
            yield spans
            spans, filled = [], 0
        spans.append(RowSpan(start, end, n, n + 1))
        filled += end - start
    if spans:
        yield spans


@dataclass(frozen=True)
class RowLayout:
    """The layout of the rows that a cell looks up, and of its ids, from the table's home to the compute device.

    scratch: bytes that are read from a disk at once.
    """

    table: WeightSpec
    placement: Placement
    topology: Topology
    scratch: int

    @property
    def lane(self) -> LaneName:
        """The lane that gathers the rows."""
        return LaneName.DISK_READ if self.placement.of(self.table) is Tier.DISK else LaneName.HOST

    def load(self, tokens: int) -> Routes:
        """The routes of the rows of `tokens` ids. It assumes that the ids are all different and spread evenly."""
        found = min(tokens, self.table.shape[0])
        stored = stored_row_bytes(self.table, self.placement, found)
        gathered = stored
        if self.lane is LaneName.DISK_READ:
            gathered = even_read_bytes(self.table, self.placement, found, self.scratch)
        ids = tokens * torch.int64.itemsize
        onward = (Move(lane, ids + stored) for lane in self.topology.to_device)
        return (Route(self.placement.of(self.table), (Move(self.lane, gathered, Kind.GATHER), *onward)),)


def row_layout(
    layers: Sequence[Layer], placement: Placement, topology: Topology, tokens: int
) -> RowLayout | None:
    """The layout for a batch of at most `tokens` ids, or None if the table is used in place."""
    table = gathered_table(layers[0], placement, topology)
    if table is None:
        return None
    return RowLayout(table, placement, topology, lookup_sizes(layers, placement, topology, tokens).scratch)
