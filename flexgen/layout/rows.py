"""The embedding table where a cell reads a few of its rows: they are gathered at its home, and only they travel."""

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
"""Bytes between two rows that are read along: a read of its own would take about as long."""
_SPAN = 1 * MIB
"""Bytes of one read at most, so that neighbouring rows are read by several threads."""
_SCRATCH = 16 * MIB
"""Bytes that are read at once at most; more rows are read in rounds."""


def gathered_table(layer: Layer, placement: Placement, topology: Topology) -> WeightSpec | None:
    """The layer's table, unless the compute device uses it in place."""
    table = layer.table
    if table is None:
        return None
    return None if topology.in_place(placement.of(table)) else table


def travelling(layer: Layer, placement: Placement, topology: Topology) -> list[WeightSpec]:
    """The layer's weights that it gets whole, wherever they live."""
    table = gathered_table(layer, placement, topology)
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
    layers: Sequence[Layer], placement: Placement, topology: Topology, tokens: int
) -> LookupSizes:
    """What a batch of `tokens` ids takes; nothing where the table is in place."""
    table = gathered_table(layers[0], placement, topology)
    if table is None:
        return LookupSizes()
    rows = min(tokens, table.shape[0])
    lead = align(tokens * torch.int64.itemsize, ALIGNMENT)
    slot = align(lead + kept_bytes(table, placement, rows), ALIGNMENT)
    scratch = 0
    if placement.of(table) is Tier.DISK:
        blocks = max(align(row, BLOCK) for _, row in row_parts(table, placement, rows)) + BLOCK
        scratch = max(min(rows * (blocks + _READ_ALONG), _SCRATCH), blocks)
    decoded = rows * table.shape[1] * placement.dtype.itemsize if placement.codec(table) else 0
    return LookupSizes(rows, lead, slot, 0 if topology.shares_host_memory else slot, scratch, decoded)


def row_parts(table: WeightSpec, placement: Placement, rows: int) -> tuple[tuple[int, int], ...]:
    """(where row 0 begins, bytes of a row) of each part of a table of `rows` rows, as it is kept."""
    codec = placement.codec(table)
    if codec is not None:
        return codec.rows((rows, table.shape[1]))
    return ((0, table.shape[1] * placement.dtype.itemsize),)


def kept_bytes(table: WeightSpec, placement: Placement, rows: int) -> int:
    """Bytes of `rows` rows of a table as they are kept."""
    shape, codec = (rows, table.shape[1]), placement.codec(table)
    return codec.nbytes(shape) if codec else rows * table.shape[1] * placement.dtype.itemsize


def read_bytes(table: WeightSpec, placement: Placement, rows: np.ndarray, begin: int, scratch: int) -> int:
    """Bytes that `RowTable.gather` reads of a table on disk for these rows, ascending, each once.

    The table begins `begin` bytes into its file; at most `scratch` bytes are read at once.
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
    """`read_bytes` of `count` rows that are spread evenly over a table at the start of its file: an estimate for
    ids that are not known."""
    return _even_read_bytes(
        tuple(row_parts(table, placement, table.shape[0])), table.shape[0], count, scratch
    )


@lru_cache(maxsize=1024)
def _even_read_bytes(parts: tuple[tuple[int, int], ...], rows: int, count: int, scratch: int) -> int:
    return _read_bytes(parts, np.arange(count) * rows // count, 0, scratch)


class RowSpan(NamedTuple):
    """Whole blocks of a file, and the rows (of those asked for) that are in them."""

    start: int
    end: int
    first: int
    last: int


def read_rounds(offsets: np.ndarray, width: int, room: int) -> Iterator[list[RowSpan]]:
    """Spans over rows of `width` bytes at ascending offsets, in rounds of at most `room` bytes.

    Where rows are close together a span also reads what is between them. Ids that cover much of a table become
    one long read.
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
                )  # of very many rows, so no _replace
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
    """The rows of a table that a cell reads, from the table's home to the compute device, and its ids with them.

    `scratch`: bytes that are read from a disk at once.
    """

    table: WeightSpec
    placement: Placement
    topology: Topology
    scratch: int

    @property
    def lane(self) -> LaneName:
        """The lane that gathers."""
        return LaneName.DISK_READ if self.placement.of(self.table) is Tier.DISK else LaneName.HOST

    def load(self, tokens: int) -> Routes:
        """The rows of `tokens` ids. They are not known yet: taken to be all different, and spread evenly."""
        found = min(tokens, self.table.shape[0])
        kept = kept_bytes(self.table, self.placement, found)
        gathered = kept
        if self.lane is LaneName.DISK_READ:
            gathered = even_read_bytes(self.table, self.placement, found, self.scratch)
        ids = tokens * torch.int64.itemsize
        onward = (Move(lane, ids + kept) for lane in self.topology.to_device)
        return (Route(self.placement.of(self.table), (Move(self.lane, gathered, Kind.GATHER), *onward)),)


def row_layout(
    layers: Sequence[Layer], placement: Placement, topology: Topology, tokens: int
) -> RowLayout | None:
    """The layout of a batch of at most `tokens` ids; None where the table is used in place."""
    table = gathered_table(layers[0], placement, topology)
    if table is None:
        return None
    return RowLayout(table, placement, topology, lookup_sizes(layers, placement, topology, tokens).scratch)
