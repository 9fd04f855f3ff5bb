"""Parts of the KV cache (a batch's rows of one tier in one layer), and their slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from flexgen.layout.cache import CacheSegment
from flexgen.runtime.pages import Page, pages_in


@dataclass(frozen=True)
class Part:
    """The home of one segment of the cache: one batch in one layer on one tier."""

    segment: CacheSegment
    home: Tensor | None = None  # bytes, on the GPU or CPU tier
    pages: tuple[Page, ...] = ()
    file: tuple[Path, int] | None = None  # on the disk tier: the file and the offset of the part
    tail: Tensor | None = None
    tail_page: tuple[Page, ...] = ()

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of the part, from an x with all rows of the batch."""
        rows = self.segment.rows
        return x if len(rows) == x.shape[0] else x[rows.start : rows.stop]

    def only(self, rows: range) -> Part | None:
        """The part for some rows of the batch, numbered from 0, in the same memory; None if it has none of them.

        Not for the disk tier, where a page of all rows is written at once.
        """
        own = self.segment.rows
        here = range(max(own.start, rows.start), min(own.stop, rows.stop))
        if len(here) == len(own):
            some = slice(None)
        elif here:
            some = slice(here.start - own.start, here.stop - own.start)
        else:
            return None
        segment = replace(self.segment, rows=range(here.start - rows.start, here.stop - rows.start))
        return replace(self, segment=segment, pages=tuple((k[some], v[some]) for k, v in self.pages))


class Slot:
    """Buffers of one cell for a cache that moves. Their views depend on the segment."""

    def __init__(self, device: Tensor | None, host: Tensor | None, fresh: Tensor | None) -> None:
        self.device = device
        self.host = host
        self.fresh = fresh
        self.new: tuple[Tensor, Tensor] | None = None  # stored form of k and v on the device, until `store`
        self._pages: dict[tuple[int, CacheSegment], list[Page]] = {}

    def pages(self, buffer: Tensor, segment: CacheSegment) -> list[Page]:
        key = buffer.data_ptr(), segment
        if key not in self._pages:
            self._pages[key] = pages_in(buffer[: segment.nbytes], segment)
        return self._pages[key]
