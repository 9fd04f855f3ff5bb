"""The KV cache of one block: the moves of keys and values, and attention over them.

Each batch of each attention layer has one `Part` for every `CacheSegment` of its rows (`CacheStorage`). Attention
reads a resident part at its home. The other parts are loaded page by page to one of a few slots, in device memory, or
in host memory for rows on disk. The chains of `store` move new keys and values home for later tokens.

With sparse attention, only the keys of a part on disk are prefetched. The cell reads the values that it has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.new_tokens import store_tokens
from flexgen.kernels.partial import merge
from flexgen.kernels.scoring import Length, Scoring
from flexgen.layout.cache import CacheSegment, Span, leaves_device
from flexgen.layout.cache_pool import CachePool
from flexgen.layout.moves import Move, Routes
from flexgen.layout.passes import Passes
from flexgen.layout.plan import SLOTS
from flexgen.memory.lanes import Job
from flexgen.memory.machine import Machine
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.models import Chunk
from flexgen.models.ops import causal_attention, causal_part
from flexgen.policy import Split, Tier
from flexgen.runtime.attention_outputs import AttentionOutput, OnDevice, together, with_prefix
from flexgen.runtime.cache_jobs import CacheJobs
from flexgen.runtime.cache_storage import CacheStorage
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.compaction import Moved, Reseated
from flexgen.runtime.host_attention import HostAttention
from flexgen.runtime.pages import (
    Bring,
    Fixed,
    Page,
    Stretch,
    attend,
    attend_fixed,
    attend_several,
    joined,
    put,
    put_at,
    put_by_row,
    several_part,
    stretch,
)
from flexgen.runtime.parts import Part, Slot
from flexgen.runtime.sparse import ValueReader


class KVCache:
    """Keys and values of layers. layers: the segments of each batch, by number of the layer. heads: the number of
    query heads of each layer.

    passes: those of the largest block. pool: the pages that the batches share; None if each has all of its own.
    """

    @whole_or_closed
    def __init__(
        self,
        layers: Mapping[int, Sequence[Sequence[CacheSegment]]],
        heads: Mapping[int, int],
        passes: Passes,
        machine: Machine,
        slots: int = SLOTS,
        pool: CachePool | None = None,
    ) -> None:
        self._device = machine.device
        self._jobs = CacheJobs(machine)
        self._taken = Taken()
        self._values = ValueReader(machine.io)
        self._taken.also(self._values.close)
        self._joined: dict[Tier, Stretch] = {}  # tokens of rings, while a cell of several tokens is computed
        self._storage = CacheStorage(layers, heads, passes, machine, slots, pool)
        self._taken.also(self._storage.close)
        self.host = HostAttention(layers, heads, passes, machine, slots)
        self._taken.also(self.host.close)

    def close(self) -> None:
        """Release all memory and files."""
        self._taken.close()

    # Moves

    def loads(self, layer: int, batch: int) -> bool:
        """Whether `load` has work in some step of this layer and batch."""
        return bool(self._storage.layouts[layer, batch].loaded)

    def stores(self, layer: int, batch: int) -> bool:
        """Whether `store` has work in some step of this layer and batch."""
        return bool(self._storage.layouts[layer, batch].stored)

    def load(self, cell: BoundCell) -> Chains:
        """The work that loads the cached tokens for attention."""
        return self._bind(
            cell, self._storage.layouts[cell.layer, cell.batch].load(cell.span), self._jobs.load
        )

    def store(self, cell: BoundCell) -> Chains:
        """The work that moves the new keys and values home, after `attend`."""
        return self._bind(
            cell, self._storage.layouts[cell.layer, cell.batch].store(cell.span), self._jobs.store
        )

    def _bind(
        self, cell: BoundCell, routes: Routes, job: Callable[[Part, Slot, BoundCell, Move], Job]
    ) -> Chains:
        if not routes:
            return ()
        storage = self._storage
        parts = {part.segment.tier: part for part in storage.parts(cell)}
        return bind(routes, lambda tier, move: job(parts[tier], storage.slot(tier, cell), cell, move))

    def cached(self, cell: BoundCell) -> Stretch:
        """The cached tokens of a batch whose rows are on one tier, in the memory in which the device computes
        attention. The oldest tokens of a ring are left out."""
        (part,), length = self._storage.parts(cell), cell.span.length
        first = 0 if part.segment.window is None else max(length - part.segment.window + 1, 0)
        return stretch(self._pages(part, cell), part.segment.page_tokens, first, length)

    # Rows that leave or move

    def regroup(self, batches: Sequence[Moved], split: Split) -> None:
        """Continue with these batches (see `CacheStorage.regroup`)."""
        self._storage.regroup(batches, split)
        self.host.regroup(self._storage.segments())

    def divide(self, cells: Sequence[tuple[int, range]], moved: Reseated) -> None:
        """Move the cache of some rows, and continue with cells that compute these places of these batches."""
        self._storage.reseat(moved)
        self._storage.divide(cells)
        self.host.regroup(self._storage.segments())

    def reset(self) -> None:
        """Continue with the batches for which the cache was made, for other prompts."""
        self._storage.reset()
        self.host.regroup(self._storage.segments())

    def cut(self, length: int, shorter: int) -> None:
        """Keep the first `shorter` of the `length` cached tokens. No transfer may be in flight."""
        self._storage.cut(length, shorter)

    def can_cut(self, length: int, shorter: int) -> bool:
        """Whether the cache still has the tokens that follow-up tokens of the first `shorter` of `length` attend to.
        A ring may have overwritten some."""
        every = (segment for segments in self._storage.segments().values() for segment in segments)
        return all(s.full_pages(shorter).start >= s.full_pages(length).start for s in every)

    # Attention

    def asks_host(self, cell: BoundCell) -> bool:
        """Whether the host computes attention for rows of the batch, which it does for one new token per row, and
        its guesses."""
        return cell.span.decodes and self.host.attends(cell)

    def asks_device(self, cell: BoundCell) -> bool:
        """Whether the device computes attention while the host does it for some rows."""
        return cell.prefix is not None or any(p.segment.on_device for p in self._storage.parts(cell))

    def attend(self, cell: BoundCell, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention of the new tokens, whose keys and values are stored. Part of the cell's computation.

        q and the result are (rows, heads, new, head_dim), k and v (rows, kv_heads, new, head_dim), all on the compute
        device.
        """
        if not cell.span.decodes:
            self.keep(cell, k, v)
            return self.attend_chunk(cell, Chunk(slice(0, len(q)), slice(0, cell.span.new)), q, k, v, scoring)
        asks = self.asks_host(cell)
        if asks:
            self.host.collect(cell, q, k, v)
            self.host.send(cell)
            self._device.wait_for_compute()
        # The work of the device's rows is only enqueued: it runs while the host computes its own rows.
        on_device = self.attend_on_device(cell, q, k, v, scoring)
        if asks:
            self.attend_on_host(cell, scoring)
            self.host.fetch(cell)
        return self.join(cell, on_device)

    def attend_chunk(
        self, cell: BoundCell, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        """`attend` for the part `chunk` of a cell of several tokens, after `keep`: its q, and k and v of the cell."""
        rows, padding = range(len(k))[chunk.rows], cell.padding
        prefix = cell.attend_prefix(q, scoring, chunk.rows, chunk.tokens.start)
        scoring = cell.own(scoring)
        if not cell.span.length:
            if len(rows) < len(k) or chunk.tokens.stop < k.shape[2]:
                k, v = (x[chunk.rows, :, : chunk.tokens.stop] for x in (k, v))
            starts = padding.starts[chunk.rows] if padding.any else None
            if not prefix:
                return causal_attention(q, k, v, starts, scoring)
            return merge([causal_part(q, k, v, starts, scoring), *prefix], q.dtype)
        length, outs = cell.span.length + chunk.tokens.stop, list[AttentionOutput]()
        attend_own = several_part if prefix else attend_several
        for part in self._storage.parts(cell):
            own = part.segment.rows
            shared = slice(max(rows.start, own.start), min(rows.stop, own.stop))
            if shared.start < shared.stop:
                first = padding.first_visible(own, scoring.window, cell.span.length + chunk.tokens.start)
                whole = self._joined.get(part.segment.tier)
                if whole is None:
                    whole = stretch(self._pages(part, cell), part.segment.page_tokens, first, length)
                within = slice(shared.start - own.start, shared.stop - own.start)
                cached = Stretch([(k[within], v[within]) for k, v in whole.pages], whole.base)
                queries = q[shared.start - rows.start : shared.stop - rows.start]
                starts = padding.starts[shared]
                outs.append(attend_own(cached, part.segment.heads, queries, starts, length, scoring))
        if rows.stop == len(k) and chunk.tokens.stop == cell.span.new:
            self._joined.clear()
        return with_prefix(together(outs), prefix, q.dtype)

    def _pages(self, part: Part, cell: BoundCell) -> Sequence[Page]:
        """Pages with all tokens of the cell, in the memory in which the device computes attention."""
        buffers = self._storage.slot(part.segment.tier, cell)
        if buffers.device is not None:
            return buffers.pages(buffers.device, part.segment)
        return self._jobs.working_pages(part, buffers, cell.span)

    def attend_on_device(
        self, cell: BoundCell, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> OnDevice:
        """`attend` in a decode step for the rows of the device, and for all rows over a shared prefix."""
        outs = list[AttentionOutput]()
        for part in self._storage.parts(cell):
            if part.segment.on_device:
                pages, bring = self._keep(part, cell, k, v), self._bring(part, cell)
                outs.append(attend(pages, cell, part.segment, part.rows_of(q), cell.own(scoring), bring))
        return OnDevice(outs, cell.attend_prefix(q, scoring))

    def attend_at(
        self, cell: BoundCell, at: Fixed, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        """`attend` in a decode step, in a form that a CUDA graph can capture. The pages of all rows are on the
        device."""
        (part,) = self._storage.parts(cell)
        heads = part.segment.heads
        put_at(part.pages, at.index, *heads.encode_both(k, v))
        return attend_fixed(part.pages, at, heads, q, scoring)

    def attend_in_place(
        self,
        cell: BoundCell,
        lengths: tuple[Length, Length],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """`attend` in a decode step, in a form that a tape can record (`kernels.tape`), for cells that `records`.

        lengths: the tokens of the rows before and after the step."""
        (part,) = self._storage.parts(cell)
        heads, (before, after) = part.segment.heads, lengths
        store_tokens(part.pages, before, *heads.encode_both(k, v))
        starts = cell.padding.of(part.segment.rows, q.device)
        return decode_attention(q, part.pages, after, starts, scoring, heads)

    def records(self, layer: int, batch: int) -> bool:
        """Whether the pages of all rows stay in place in the memory of the CPU, and have all tokens."""
        parts = self._storage.parts_of(layer, batch)
        segment = parts[0].segment
        in_place = len(parts) == 1 and segment.resident and segment.on_device and bool(parts[0].pages)
        return in_place and segment.window is None and not segment.sparse

    def attend_on_host(self, cell: BoundCell, scoring: Scoring) -> None:
        """`attend` for the rows of the host, after `host.send`. `host.fetch` returns the result."""
        parts = (
            (
                part.segment,
                partial(
                    self._jobs.put,
                    part,
                    self._storage.slot(part.segment.tier, cell),
                    cell.span,
                    lengths=cell.lengths(part.segment.rows),
                ),
                self._bring(part, cell),
            )
            for part in self._storage.parts(cell)
            if not part.segment.on_device
        )
        self.host.attend(cell, parts, cell.own(scoring))

    def join(self, cell: BoundCell, on_device: OnDevice) -> Tensor:
        """The results of all rows: those of the device, followed by that of the host if it computed any."""
        outs = [*on_device.own, self.host.take(cell)] if self.asks_host(cell) else on_device.own
        return with_prefix(together(outs), on_device.prefix, self._storage.parts(cell)[0].segment.dtype)

    def _bring(self, part: Part, cell: BoundCell) -> Bring | None:
        """A function that reads chosen values of a part on disk to its pages, or None if they came with the keys."""
        segment, buffers = part.segment, self._storage.slot(part.segment.tier, cell)
        if part.file is None or buffers.host is None or not segment.loads_only_keys(self._device.topology):
            return None
        (path, start), host = part.file, buffers.host
        return lambda choice: self._values.read(choice, segment, path, start, host, cell.span)

    def keep(self, cell: BoundCell, k: Tensor, v: Tensor) -> None:
        """Accept the keys and values of a cell of several tokens, for `store` and for attention in chunks."""
        for part in self._storage.parts(cell):
            self._keep(part, cell, k, v)

    def _keep(self, part: Part, cell: BoundCell, k: Tensor, v: Tensor) -> Sequence[Page]:
        """Accept the new keys and values of a part. Returns the pages on the device that now have all tokens."""
        segment, buffers, span = part.segment, self._storage.slot(part.segment.tier, cell), cell.span
        k, v = segment.heads.encode_both(part.rows_of(k), part.rows_of(v))
        lengths = cell.lengths(segment.rows)
        joins = segment.window is not None and span.extends
        if joins:  # the new tokens overwrite cached ones that they attend to
            assert segment.window is not None
            cached = self._pages(part, replace(cell, span=Span(span.length, 0)))
            first = max(span.length - segment.window + 1, 0)
            self._joined[segment.tier] = joined(cached, first, span.length, k, v)
        if (stored := segment.stored(span.new)) < span.new:
            k, v = (x[:, :, span.new - stored :] for x in (k, v))
        if leaves_device(segment, span, self._device.topology):
            buffers.new = k.contiguous(), v.contiguous()  # until `store` has copied them
            if not span.length or buffers.device is None or joins:
                return ()
            pages = buffers.pages(buffers.device, segment)
            if isinstance(lengths, int):
                put(pages, lengths, k, v)
            else:
                put_by_row(pages, lengths, k, v)
            return pages
        return self._jobs.put(part, buffers, span, k, v, lengths)
