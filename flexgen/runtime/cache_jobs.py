"""Jobs that bring one part of a KV cache to where attention reads it, and its new keys and values home."""

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
from flexgen.runtime.pages import Page, put
from flexgen.runtime.parts import Part, Slot
from flexgen.runtime.sparse import key_reads


class CacheJobs:
    """Jobs of the lanes of a machine for a part, with the buffers of a cell."""

    def __init__(self, machine: Machine) -> None:
        self._device = machine.device
        self._topology = machine.device.topology
        self._io = machine.io

    def load(self, part: Part, buffers: Slot, span: Span, move: Move) -> Job:
        """A move of the cached tokens to where attention reads them."""
        segment = part.segment
        whole, tail = segment.filled(span.length)
        if move.kind is Kind.READ:
            assert part.file is not None and buffers.host is not None
            if segment.loads_only_keys(self._topology) and span.decodes:
                pages = whole // segment.page_bytes
                return ReadJob(self._io, key_reads(segment, *part.file, buffers.host, pages))
            return ReadJob(self._io, [Read(*part.file, buffers.host[:whole])])
        assert buffers.device is not None
        if part.home is not None:
            sources = [part.home[: whole + tail]]
        else:
            assert part.tail is not None and buffers.host is not None
            sources = [source for source in (buffers.host[:whole], part.tail[:tail]) if len(source)]
        return partial(self._copy_in, buffers.device, sources)

    def _copy_in(self, target: Tensor, sources: Sequence[Tensor]) -> None:
        begin = 0
        for source in sources:
            self._device.to_device(target[begin : begin + source.nbytes], source)
            begin += source.nbytes

    def store(self, part: Part, buffers: Slot, span: Span, move: Move) -> Job:
        """A move of the new keys and values home."""
        match move.kind:
            case Kind.COPY:
                return partial(self._copy_out, part, buffers, span)
            case Kind.PUT:
                return partial(self._put_fresh, part, buffers, span)
            case _:
                return partial(self._io.write, self.flush(part, buffers, span))

    def _fresh(self, part: Part, buffers: Slot, span: Span) -> tuple[Tensor, Tensor]:
        assert buffers.fresh is not None
        segment = part.segment
        shape = (2, len(segment.rows), segment.kv_heads, span.new, segment.heads.width)
        both = tensor_at(buffers.fresh, 0, shape, segment.heads.dtype)
        return both[0], both[1]

    def _copy_out(self, part: Part, buffers: Slot, span: Span) -> None:
        assert buffers.new is not None
        for target, source in zip(self._fresh(part, buffers, span), buffers.new, strict=True):
            self._device.from_device(target, source)

    def _put_fresh(self, part: Part, buffers: Slot, span: Span) -> None:
        self.put(part, buffers, span, *self._fresh(part, buffers, span))

    def put(self, part: Part, buffers: Slot, span: Span, k: Tensor, v: Tensor) -> Sequence[Page]:
        """Write new keys and values, as they are kept, to the working pages, which are returned.

        Once for each step: a tail that the step fills moves into the slot, where the other whole pages are, and what
        follows it begins a new tail.
        """
        first, last = span.pages(part.segment.page_tokens)
        if buffers.host is not None and last > first and span.length % part.segment.page_tokens:
            assert part.tail is not None
            begin = first * part.segment.page_bytes
            buffers.host[begin : begin + part.tail.nbytes].copy_(part.tail)
        pages = self.working_pages(part, buffers, span)
        put(pages, span.length, k, v)
        return pages

    def working_pages(self, part: Part, buffers: Slot, span: Span) -> Sequence[Page]:
        """Pages in host memory (or at home on the device) that hold the cached tokens and take the new ones."""
        if buffers.host is None:
            return part.pages
        _, last = span.pages(part.segment.page_tokens)
        return [*buffers.pages(buffers.host, part.segment)[:last], *part.tail_page]

    def flush(self, part: Part, buffers: Slot, span: Span) -> list[Write]:
        """Pages that became whole, to their file."""
        assert part.file is not None and buffers.host is not None
        (path, start), segment = part.file, part.segment
        first, last = (page * segment.page_bytes for page in span.pages(segment.page_tokens))
        return [Write(path, start + first, buffers.host[first:last])]
