"""Reads of sparse attention from a cache on disk: all keys in advance, and only the chosen blocks of the values."""

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
    """Bytes of the keys of a page, and of the values after them. A page has no other bytes: see `sparsity`."""
    return segment.page_bytes // 2


def key_reads(segment: CacheSegment, path: Path, start: int, buffer: Tensor, pages: int) -> list[Read]:
    """Reads of the keys of the first `pages` pages of a part that begins at byte `start` of its file."""
    begins = range(0, pages * segment.page_bytes, segment.page_bytes)
    return [Read(path, start + begin, buffer[begin : begin + _half(segment)]) for begin in begins]


class ValueReader:
    """Reads the chosen values during a computation, with its own threads.

    The reads must not queue behind the prefetches of later cells. The pieces are short, so several must be in flight
    at any time.
    """

    def __init__(self, io: DiskIO) -> None:
        self._io = io
        self._pool: ThreadPoolExecutor | None = None  # created for the first read: most caches need none

    def read(
        self, choice: Choice, segment: CacheSegment, path: Path, start: int, buffer: Tensor, span: Span
    ) -> None:
        """Read the chosen values of a part that begins at byte `start` of its file to `buffer`, then return."""
        reads = value_reads(choice, segment, path, start, buffer, span)
        parts = [reads[n :: self._io.threads] for n in range(self._io.threads)]
        self._pool = self._pool or pool(self._io.threads, "flexgen-values")
        futures: list[Future[None]] = []
        try:
            for part in filter(None, parts):
                futures.append(self._pool.submit(self._read_part, part))
            for future in futures:
                future.result()
        finally:  # after an error or an interrupt too, no thread may write to the buffer
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _read_part(self, reads: Sequence[Read]) -> None:
        # The prefetch threads would do reads of more than a chunk.
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
    """Reads of the blocks of values with chosen tokens. Adjacent blocks of the file are one read.

    The page that is being filled is already in host memory.
    """
    pages, unit = span.length // segment.page_tokens, segment.sparsity.unit
    items, per_page = len(segment.rows) * segment.kv_heads, segment.page_tokens // unit
    positions = choice.positions.view(items, -1).numpy()
    item, nth = np.nonzero(positions < pages * segment.page_tokens)
    page, block = np.divmod(positions[item, nth] // unit, per_page)
    # One more entry than blocks in each page, and one before the first page, so that no run spans two pages.
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
