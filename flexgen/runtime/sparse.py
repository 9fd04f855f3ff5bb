"""Reads of sparse attention from a cache on disk: all keys ahead, and only the chosen blocks of the values."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from torch import Tensor

from flexgen.kernels.sparse_attention import Choice
from flexgen.layout.cache import CacheSegment, Span
from flexgen.memory.disk import DiskIO, Read
from flexgen.memory.threads import pool


def _half(segment: CacheSegment) -> int:
    """Bytes of the keys of a page, and of its values, which follow. A page has no others: see `choice_tokens`."""
    return segment.page_bytes // 2


def key_reads(segment: CacheSegment, path: Path, start: int, buffer: Tensor, pages: int) -> list[Read]:
    """The keys of the first `pages` pages of a part that begins at byte `start` of its file, to their places."""
    begins = range(0, pages * segment.page_bytes, segment.page_bytes)
    return [Read(path, start + begin, buffer[begin : begin + _half(segment)]) for begin in begins]


class ValueReader:
    """Reads the chosen values during a computation, in threads of its own.

    They must not queue behind what is read ahead for later cells; and as each piece is short, several must be
    under way at any time.
    """

    def __init__(self, io: DiskIO) -> None:
        self._io = io
        self._pool: ThreadPoolExecutor | None = None  # made for the first read: most caches need none

    def read(
        self, choice: Choice, segment: CacheSegment, path: Path, start: int, buffer: Tensor, span: Span
    ) -> None:
        """Return when `buffer` has the chosen values of a part that begins at byte `start` of its file."""
        reads = value_reads(choice, segment, path, start, buffer, span)
        parts = [reads[n :: self._io.threads] for n in range(self._io.threads)]
        self._pool = self._pool or pool(self._io.threads, "flexgen-values")
        futures: list[Future[None]] = []
        try:
            for part in filter(None, parts):
                futures.append(self._pool.submit(self._read_part, part))
            for future in futures:
                future.result()
        finally:  # the buffer must not be written any more, after an error or an interrupt too
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _read_part(self, reads: Sequence[Read]) -> None:
        # Reads of more than a chunk would be given to the threads that read ahead.
        batch: list[Read] = []
        nbytes = 0
        for read in reads:
            nbytes += read.target.numel()
            if batch and nbytes > self._io.chunk:
                self._io.read(batch)
                batch, nbytes = [], read.target.numel()
            batch.append(read)
        self._io.read(batch)


def value_reads(
    choice: Choice, segment: CacheSegment, path: Path, start: int, buffer: Tensor, span: Span
) -> list[Read]:
    """The blocks of values that hold chosen tokens, to their places; neighbours in the file in one read.

    The page that is being filled is in host memory already.
    """
    pages, unit = span.length // segment.page_tokens, segment.choice_tokens
    items, per_page = len(segment.rows) * segment.kv_heads, segment.page_tokens // unit
    positions = choice.positions.view(items, -1).numpy()
    item, nth = np.nonzero(positions < pages * segment.page_tokens)
    page, block = np.divmod(positions[item, nth] // unit, per_page)
    # One more than there is in each page, and one before the first: no run continues from page to page.
    wanted = np.zeros((pages + 1, items * per_page + 1), dtype=np.int8)
    wanted[page + 1, item * per_page + block] = 1
    width, edges = wanted.shape[1], np.flatnonzero(np.diff(wanted.ravel())) + 1
    block_bytes = unit * segment.head_dim * segment.dtype.itemsize
    reads = []
    for begin, end in edges.reshape(-1, 2).tolist():
        page_number, first = divmod(begin, width)
        at = (page_number - 1) * segment.page_bytes + _half(segment) + first * block_bytes
        reads.append(Read(path, start + at, buffer[at : at + (end - begin) * block_bytes]))
    return reads
