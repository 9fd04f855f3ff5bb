"""The KV cache of one block: where keys and values live, how they travel, and where they are attended.

Each batch of each attention layer has one `Part` for every `CacheSegment` of its rows. Layers may differ in what they
keep of a token; which rows a tier has is the same for all. A resident part is
attended where it lies. The others come, page by page, into one of a few slots: in device memory, or in host
memory for rows on disk. New keys and values leave by the chains of `store`, so that a later token finds them.

A part on disk grows through its tail, the page that is being filled, which stays in host memory: the file
only ever sees whole pages. With sparse attention only its keys come ahead; of its values the cell reads those
that it has chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexgen.layout.cache import CacheLayout, CacheSegment, Span, leaves_device
from flexgen.layout.plan import SLOTS
from flexgen.memory.disk import Read
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.models import Chunk
from flexgen.models.ops import causal_attention
from flexgen.policy import Split, Tier
from flexgen.runtime.cache_jobs import CacheJobs
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.compaction import Moved, gather
from flexgen.runtime.host_attention import HostAttention
from flexgen.runtime.pages import (
    Bring,
    Fixed,
    Padding,
    Page,
    attend,
    attend_fixed,
    attend_several,
    pages_in,
    put,
)
from flexgen.runtime.parts import Part, Slot
from flexgen.runtime.sparse import ValueReader


class KVCache:
    """Keys and values of the `layers`: by number the segments of each batch. `heads`: of each layer's queries.

    A cell computes at most `new` tokens of each row. extends: some cells compute several tokens after cached ones.
    """

    @whole_or_closed
    def __init__(
        self,
        layers: Mapping[int, Sequence[Sequence[CacheSegment]]],
        heads: Mapping[int, int],
        new: int,
        machine: Machine,
        slots: int = SLOTS,
        extends: bool = False,
    ) -> None:
        self._extends = extends
        self._device = machine.device
        self._topology = machine.device.topology
        self._heads = heads
        self._host = machine.host
        self._disk = machine.disk
        self._io = machine.io
        self._jobs = CacheJobs(machine)
        self._taken = Taken()
        self._values = ValueReader(machine.io)
        self._taken.also(self._values.close)
        self._files = 0
        self._parts: dict[tuple[int, int], list[Part]] = {
            (j, k): [] for j, batches in layers.items() for k in range(len(batches))
        }
        for batch, of_layers in enumerate(zip(*layers.values(), strict=True)):
            for of_tier in zip(*of_layers, strict=True):
                for layer, part in zip(layers, self._make_parts(of_tier), strict=True):
                    self._parts[layer, batch].append(part)
        self._made = self._parts
        self._layouts = self._layouts_of(self._parts)
        every = [segment for batches in layers.values() for segments in batches for segment in segments]
        self._slots = {
            tier: [self._make_slot([s for s in every if s.tier is tier], new) for _ in range(slots)]
            for tier in {segment.tier for segment in every}
        }
        self.host = HostAttention(layers, heads, machine, slots)
        self._taken.also(self.host.close)

    def close(self) -> None:
        """Give back all memory and files."""
        self._taken.close()

    # Buffers

    def _take(self, store: Store, nbytes: int, purpose: str, copied_by_device: bool = True) -> Tensor:
        return self._taken.buffer(store, nbytes, purpose, copied_by_device)

    def _make_parts(self, segments: Sequence[CacheSegment]) -> Iterator[Part]:
        """The parts of one batch on one tier, from the segment of each layer."""
        tier, on_device = segments[0].tier, self._reaches_device(segments[0])
        sizes = [segment.nbytes for segment in segments]
        if tier is Tier.DISK:
            path = self._taken.file(self._disk, f"cache-{self._files}", sum(sizes))
            self._files += 1
            pages, purpose = [s.page_bytes for s in segments], "tails of the KV cache on disk"
            tails = self._take(self._host, sum(pages), purpose, copied_by_device=on_device)
            starts = itertools.accumulate(sizes, initial=0)
            for segment, start, tail in zip(segments, starts, tails.split(pages), strict=False):
                page = tuple(pages_in(tail, segment))
                yield Part(segment, file=(path, start), tail=tail, tail_page=page)
            return
        store = self._device.memory if tier is Tier.GPU else self._host
        homes = self._take(store, sum(sizes), "KV cache", copied_by_device=on_device)
        for segment, home in zip(segments, homes.split(sizes), strict=True):
            yield Part(segment, home=home, pages=tuple(pages_in(home, segment)))

    def _reaches_device(self, segment: CacheSegment) -> bool:
        """Whether the compute device computes attention over it in some step."""
        return segment.on_device or self._extends

    def _make_slot(self, segments: Sequence[CacheSegment], new: int) -> Slot:
        """Buffers for the parts of one tier: each as large as the layer and batch that need most."""
        largest = max(segment.nbytes for segment in segments)
        tier, on_device = segments[0].tier, self._reaches_device(segments[0])
        in_device = on_device and not self._topology.in_place(tier)
        in_device &= not self._topology.shares_host_memory
        fresh = max(segment.token_bytes(new) for segment in segments)
        return Slot(
            device=self._take(self._device.memory, largest, "slots of the KV cache") if in_device else None,
            host=self._take(self._host, largest, "slots of the KV cache", copied_by_device=on_device)
            if tier is Tier.DISK
            else None,
            fresh=None
            if self._topology.shares_host_memory or tier is Tier.GPU
            else self._take(self._host, fresh, "staging of the KV cache"),
        )

    # Travel

    def load(self, layer: int, batch: int, slot: int, span: Span) -> Chains:
        """The work that brings the cached tokens to where attention reads them."""
        parts = {part.segment.tier: part for part in self._parts[layer, batch]}
        routes = self._layouts[layer, batch].load(span)
        return bind(
            routes, lambda tier, move: self._jobs.load(parts[tier], self._slots[tier][slot], span, move)
        )

    def store(self, layer: int, batch: int, slot: int, span: Span) -> Chains:
        """The work that brings the new keys and values home, after `attend`."""
        parts = {part.segment.tier: part for part in self._parts[layer, batch]}
        routes = self._layouts[layer, batch].store(span)
        return bind(
            routes, lambda tier, move: self._jobs.store(parts[tier], self._slots[tier][slot], span, move)
        )

    # Regrouping

    def regroup(self, batches: Sequence[Moved], split: Split) -> None:
        """Go on with these batches, their rows on the tiers by `split`; no transfer may be under way.

        A new batch takes the place of the old one of its number. As many rows fit into the new batches up to that
        one as into the old ones, so whatever is overwritten has been read. So this takes no memory but that of one
        batch's rows in one layer (see `gather`).
        """
        if all(moved.whole is not None for moved in batches):
            kept = {
                (j, k): self._parts[j, moved.whole]
                for j in {layer for layer, _ in self._parts}
                for k, moved in enumerate(batches)
                if moved.whole is not None
            }
            self._go_on_with(kept)
            return
        parts: dict[tuple[int, int], list[Part]] = {}
        for j in {layer for layer, _ in self._parts}:
            for k, moved in enumerate(batches):
                tiers = split.rows(len(moved.rows))
                places = [part for part in self._parts[j, k] if tiers[part.segment.tier]]
                segments = [replace(part.segment, rows=tiers[part.segment.tier]) for part in places]
                held = gather(moved, segments, self._histories(j, moved), self._device)
                parts[j, k] = [
                    self._refill(part, segment, *both)
                    for part, segment, both in zip(places, segments, held, strict=True)
                ]
        self._go_on_with(parts)

    def _go_on_with(self, parts: dict[tuple[int, int], list[Part]]) -> None:
        self._parts = parts
        self._layouts = self._layouts_of(parts)
        self.host.regroup({key: [part.segment for part in some] for key, some in parts.items()})

    def _layouts_of(
        self, parts: Mapping[tuple[int, int], Sequence[Part]]
    ) -> dict[tuple[int, int], CacheLayout]:
        """By layer and batch."""
        layouts = {}
        for (layer, batch), some in parts.items():
            segments = tuple(part.segment for part in some)
            query_bytes = self._heads[layer] * segments[0].head_dim * segments[0].dtype.itemsize
            layouts[layer, batch] = CacheLayout(segments, query_bytes, self._topology)
        return layouts

    def cut(self, length: int, shorter: int) -> None:
        """Forget what follows the first `shorter` of the `length` cached tokens; no transfer may be under way.

        What a part in memory has there is overwritten by what comes next. The tail of a part on disk is read back.
        """
        for part in itertools.chain.from_iterable(self._parts.values()):
            page, rest = divmod(shorter, part.segment.page_tokens)
            if part.file is None or part.tail is None or not rest:
                continue
            if page < length // part.segment.page_tokens:
                path, start = part.file
                self._io.read([Read(path, start + page * part.segment.page_bytes, part.tail)])

    def reset(self) -> None:
        """Back to the batches that the cache was made for, for other prompts."""
        if self._parts is not self._made:
            self._go_on_with(self._made)
            for part in itertools.chain.from_iterable(self._made.values()):
                for memory in (part.home, part.tail):
                    if memory is not None:  # it was used with other shapes: what is not filled must be finite
                        memory.zero_()

    def _histories(self, layer: int, moved: Moved) -> Iterator[tuple[int, CacheSegment, Sequence[Page]]]:
        """Parts that rows move from, their pages in memory."""
        for batch in sorted(moved.sources()):
            for part in self._parts[layer, batch]:
                if moved.of(batch, part.segment.rows):
                    span = Span(moved.lengths[batch], 0)
                    buffers = self._slots[part.segment.tier][0]
                    whole, _ = part.segment.filled(span.length)
                    if part.file is not None and buffers.host is not None and whole:
                        self._io.read([Read(*part.file, buffers.host[:whole])])
                    yield batch, part.segment, self._jobs.working_pages(part, buffers, span)

    def _refill(self, part: Part, segment: CacheSegment, k: Tensor, v: Tensor) -> Part:
        """The part with the keys and values of other rows, as many as `segment` has."""
        span, buffers = Span(0, k.shape[2]), self._slots[segment.tier][0]
        if part.home is not None:
            home = part.home[: segment.nbytes].zero_()
            part = replace(part, segment=segment, home=home, pages=tuple(pages_in(home, segment)))
        elif part.tail is not None:
            tail = part.tail[: segment.page_bytes].zero_()
            part = replace(part, segment=segment, tail=tail, tail_page=tuple(pages_in(tail, segment)))
        self._jobs.put(part, buffers, span, k, v)
        if segment.flushed(span):
            self._io.write(self._jobs.flush(part, buffers, span))
        return part

    # Attention

    def asks_host(self, layer: int, batch: int, span: Span) -> bool:
        """Whether the host computes attention for rows of the batch. It does so for one new token of each row."""
        return span.decodes and self.host.attends(layer, batch)

    def asks_device(self, layer: int, batch: int) -> bool:
        """Whether the device computes attention for rows of the batch while the host does so for others."""
        return any(part.segment.on_device for part in self._parts[layer, batch])

    def attend(
        self,
        layer: int,
        batch: int,
        slot: int,
        span: Span,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Padding,
        scale: float,
    ) -> Tensor:
        """Attention of the new tokens, whose keys and values are kept; part of the cell's computation.

        q (rows, heads, new, head_dim), k and v (rows, kv_heads, new, head_dim), on the compute device, as is
        the result (rows, heads, new, head_dim).
        """
        if not span.decodes:
            self.keep(layer, batch, slot, span, k, v)
            whole = Chunk(slice(0, len(q)), slice(0, span.new))
            return self.attend_chunk(layer, batch, slot, span, whole, q, k, v, padding, scale)
        asks = self.asks_host(layer, batch, span)
        if asks:
            self.host.collect(layer, batch, slot, q, k, v)
            self.host.send(layer, batch, slot)
            self._device.wait_for_compute()
        # The device's rows are only enqueued: they run while the host attends to its own.
        attended = self.attend_on_device(layer, batch, slot, span, q, k, v, padding, scale)
        if asks:
            self.attend_on_host(layer, batch, slot, span, padding, scale)
            self.host.fetch(layer, batch, slot)
        return self.join(layer, batch, slot, span, attended)

    def attend_chunk(
        self,
        layer: int,
        batch: int,
        slot: int,
        span: Span,
        chunk: Chunk,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Padding,
        scale: float,
    ) -> Tensor:
        """`attend` for the part `chunk` of a cell of several tokens, after `keep`: its q, and k and v of the cell."""
        rows = range(len(k))[chunk.rows]
        if not span.length:
            seen = (chunk.rows, slice(None), slice(chunk.tokens.stop))
            starts = padding.starts[chunk.rows] if padding.any else None
            return causal_attention(q, k[seen], v[seen], starts, scale)
        outs = []
        for part in self._parts[layer, batch]:
            own = part.segment.rows
            shared = range(max(rows.start, own.start), min(rows.stop, own.stop))
            if shared:
                buffers = self._slots[part.segment.tier][slot]
                if buffers.device is not None:
                    pages: Sequence[Page] = buffers.pages(buffers.device, part.segment)
                else:
                    pages = self._jobs.working_pages(part, buffers, span)
                asked = q[shared.start - rows.start : shared.stop - rows.start]
                length = span.length + chunk.tokens.stop
                outs.append(attend_several(pages, length, asked, part.segment, shared, padding, scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_on_device(
        self,
        layer: int,
        batch: int,
        slot: int,
        span: Span,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Padding,
        scale: float,
    ) -> list[Tensor]:
        """`attend` for those rows of a later token that the device attends: one result for each part."""
        outs = []
        for part in self._parts[layer, batch]:
            if part.segment.on_device:
                pages, bring = self._keep(part, slot, span, k, v), self._bring(part, slot, span)
                outs.append(attend(pages, span, part.rows_of(q), part.segment, padding, scale, bring))
        return outs

    def capacity(self, cell: BoundCell) -> int:
        """Tokens of a row that `attend_at` finds room for."""
        (part,) = self._parts[cell.layer, cell.batch]
        return part.segment.page_tokens

    def attend_at(self, cell: BoundCell, at: Fixed, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`attend` for a later token of a batch that is on the device as a whole; it can be captured in a graph."""
        (part,) = self._parts[cell.layer, cell.batch]
        (page,) = part.pages
        return attend_fixed(page, at, q, k, v, part.segment.heads, scale)

    def attend_on_host(
        self, layer: int, batch: int, slot: int, span: Span, padding: Padding, scale: float
    ) -> None:
        """`attend` for those that the host attends, once it has been asked; its answer is still to be fetched."""
        parts = (
            (
                part.segment,
                partial(self._jobs.put, part, self._slots[part.segment.tier][slot], span),
                self._bring(part, slot, span),
            )
            for part in self._parts[layer, batch]
            if not part.segment.on_device
        )
        self.host.attend(layer, batch, slot, parts, span, padding, scale)

    def join(self, layer: int, batch: int, slot: int, span: Span, on_device: Sequence[Tensor]) -> Tensor:
        """All rows: what the device attended, and after it the answer of the host if it was asked."""
        asks = self.asks_host(layer, batch, span)
        outs = [*on_device, self.host.take(layer, batch, slot)] if asks else on_device
        return outs[0] if len(outs) == 1 else torch.cat(list(outs))

    def _bring(self, part: Part, slot: int, span: Span) -> Bring | None:
        """What brings chosen values of a part on disk into its pages, if they have not come with the keys."""
        segment, buffers = part.segment, self._slots[part.segment.tier][slot]
        if not segment.loads_only_keys(self._topology) or part.file is None or buffers.host is None:
            return None
        (path, start), host = part.file, buffers.host
        return lambda choice: self._values.read(choice, segment, path, start, host, span)

    def keep(self, layer: int, batch: int, slot: int, span: Span, k: Tensor, v: Tensor) -> None:
        """Take the keys and values of a cell of several tokens, for `store`, and for attention in chunks."""
        for part in self._parts[layer, batch]:
            self._keep(part, slot, span, k, v)

    def _keep(self, part: Part, slot: int, span: Span, k: Tensor, v: Tensor) -> Sequence[Page]:
        """Take the new keys and values of a part; returns the pages on the device that now hold all tokens."""
        segment, buffers = part.segment, self._slots[part.segment.tier][slot]
        k, v = segment.heads.encode_both(part.rows_of(k), part.rows_of(v))
        if leaves_device(segment, span, self._topology):
            buffers.new = k.contiguous(), v.contiguous()  # until `store` has copied them
            if not span.length or buffers.device is None:
                return ()
            pages = buffers.pages(buffers.device, segment)
            put(pages, span.length, k, v)
            return pages
        return self._jobs.put(part, buffers, span, k, v)
