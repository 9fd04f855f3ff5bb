"""Parts of the KV cache, each a batch's rows of one tier in one layer, and the slots that they pass through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flexgen.layout.cache import CacheSegment
from flexgen.runtime.pages import Page, pages_in


@dataclass(frozen=True)
class Part:
    """The cache of one segment of one batch in one layer, at home."""

    segment: CacheSegment
    home: Tensor | None = None  # bytes, in the GPU or CPU tier
    pages: tuple[Page, ...] = ()
    file: tuple[Path, int] | None = None  # in the disk tier: the file, and where the part begins
    tail: Tensor | None = None
    tail_page: tuple[Page, ...] = ()

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of the part, from x with all rows of the batch."""
        return x[self.segment.rows.start : self.segment.rows.stop]


class Slot:
    """Buffers of one cell for a cache that travels; views depend on the segment."""

    def __init__(self, device: Tensor | None, host: Tensor | None, fresh: Tensor | None) -> None:
        self.device = device
        self.host = host
        self.fresh = fresh
        self.new: tuple[Tensor, Tensor] | None = None  # k, v as they are kept, on the device, until stored
        self._pages: dict[tuple[int, CacheSegment], list[Page]] = {}

    def pages(self, buffer: Tensor, segment: CacheSegment) -> list[Page]:
        key = buffer.data_ptr(), segment
        if key not in self._pages:
            self._pages[key] = pages_in(buffer[: segment.nbytes], segment)
        return self._pages[key]
