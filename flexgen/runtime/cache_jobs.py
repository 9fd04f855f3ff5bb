"""Jobs that load one part of a KV cache for attention, and store its new keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from flexgen.layout.cache import Span
from flexgen.layout.moves import Kind, Move
from flexgen.memory.disk import Read, ReadJob, Write
from flexgen.memory.lanes import Job
from flexgen.memory.machine import Machine
from flexgen.memory.store import tensor_at
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.pages import Page, put, put_by_row
from flexgen.runtime.parts import Part, Slot
from flexgen.runtime.sparse import key_reads


class CacheJobs:
    """Jobs for a part of the cache and the buffers of a cell, on a machine's lanes."""

    def __init__(self, machine: Machine) -> None:
        self._device = machine.device
        self._topology = machine.device.topology
        self._io = machine.io

    def load(self, part: Part, buffers: Slot, cell: BoundCell, move: Move) -> Job:
        """The job of a move of the cached tokens to the memory in which attention reads them."""
        segment, span = part.segment, cell.span
        full, length = segment.full_pages(span.length), span.length
        if move.kind is Kind.READ:
            assert part.file is not None and buffers.host is not None
            if segment.loads_only_keys(self._topology) and span.decodes:
                return ReadJob(self._io, key_reads(segment, *part.file, buffers.host, len(full)))
            return ReadJob(self._io, self.reads(part, buffers.host, length))
        assert buffers.device is not None
        if part.home is not None:
            pages = range(full.start, -(-length // segment.page_tokens))
            sources = [(run.start, part.home[run]) for run in segment.runs(pages)]
        else:
            assert part.tail is not None and buffers.host is not None
            sources = [(run.start, buffers.host[run]) for run in segment.runs(full)]
            if length % segment.page_tokens:
                sources.append((segment.place(full.stop), part.tail[: segment.page_bytes]))
        return partial(self._copy_in, buffers.device, sources)

    def reads(self, part: Part, buffer: Tensor, length: int) -> list[Read]:
        """Reads of the full pages that a part on disk has of `length` tokens."""
        assert part.file is not None
        (path, start), segment = part.file, part.segment
        runs = segment.runs(segment.full_pages(length))
        return [Read(path, start + run.start, buffer[run]) for run in runs]

    def _copy_in(self, target: Tensor, sources: Sequence[tuple[int, Tensor]]) -> None:
        for begin, source in sources:
            self._device.to_device(target[begin : begin + source.nbytes], source)

    def store(self, part: Part, buffers: Slot, cell: BoundCell, move: Move) -> Job:
        """The job of a move of the new keys and values to their home."""
        match move.kind:
            case Kind.COPY:
                return partial(self._copy_out, part, buffers, cell.span)
            case Kind.PUT:
                return partial(self._put_fresh, part, buffers, cell)
            case _:
                return partial(self._io.write, self.flush(part, buffers, cell.span))

    def _fresh(self, part: Part, buffers: Slot, span: Span) -> tuple[Tensor, Tensor]:
        assert buffers.fresh is not None
        segment = part.segment
        tokens = segment.stored(span.new)
        shape = (2, len(segment.rows), segment.kv_heads, tokens, segment.heads.width)
        both = tensor_at(buffers.fresh, 0, shape, segment.heads.dtype)
        return both[0], both[1]

    def _copy_out(self, part: Part, buffers: Slot, span: Span) -> None:
        assert buffers.new is not None
        for target, source in zip(self._fresh(part, buffers, span), buffers.new, strict=True):
            self._device.from_device(target, source)

    def _put_fresh(self, part: Part, buffers: Slot, cell: BoundCell) -> None:
        lengths = cell.lengths(part.segment.rows)
        self.put(part, buffers, cell.span, *self._fresh(part, buffers, cell.span), lengths)

    def put(
        self,
        part: Part,
        buffers: Slot,
        span: Span,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | int,
    ) -> Sequence[Page]:
        """Write the last new keys and values, in their stored form, to the working pages, and return these.

        lengths: the column of the first new token, of all rows or of each as for `put_by_row`. Call it once per step:
        a tail that the step fills moves to the slot, which has the other full pages, and later tokens begin a new
        tail.
        """
        first, last = span.pages(part.segment.page_tokens)
        if buffers.host is not None and last > first and span.length % part.segment.page_tokens:
            assert part.tail is not None
            begin = part.segment.place(first)
            buffers.host[begin : begin + part.tail.nbytes].copy_(part.tail)
        pages = self.working_pages(part, buffers, span)
        if isinstance(lengths, int):
            put(pages, lengths + span.new - k.shape[2], k, v)
        else:
            put_by_row(pages, lengths, k, v)
        return pages

    def working_pages(self, part: Part, buffers: Slot, span: Span) -> Sequence[Page]:
        """Pages with the cached tokens and room for the new ones, in host memory or in a home on the device."""
        if buffers.host is None:
            return part.pages
        _, last = span.pages(part.segment.page_tokens)
        pages = buffers.pages(buffers.host, part.segment)
        if part.segment.window is None:
            return [*pages[:last], *part.tail_page]
        if not (span.length + span.new) % part.segment.page_tokens:
            return pages  # the tail is empty, and the oldest page may still be read
        here = last % len(pages)
        return [*pages[:here], *part.tail_page, *pages[here + 1 :]]

    def flush(self, part: Part, buffers: Slot, span: Span) -> list[Write]:
        """The writes of completed pages to their file."""
        assert part.file is not None and buffers.host is not None
        (path, start), segment = part.file, part.segment
        runs = segment.runs(segment.flushed_pages(span))
        return [Write(path, start + run.start, buffers.host[run]) for run in runs]
