"""The memory and files of a KV cache: a part for each tier of each batch and layer, and the slots of cells.

Layers may store tokens in different sizes, but the rows of a tier are the same for all layers. A part on disk has a
tail in host memory, the page that is being filled. The file has only full pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from flexgen.layout.cache import CacheLayout, CacheSegment, Span
from flexgen.layout.cache_needs import new_bytes
from flexgen.layout.cache_pool import CachePool
from flexgen.layout.passes import Passes
from flexgen.memory.disk import Read
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.policy import Split, Tier
from flexgen.runtime.cache_jobs import CacheJobs
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.compaction import Moved, Reseated, gather
from flexgen.runtime.pages import Page, copy_row, pages_in
from flexgen.runtime.parts import Part, Slot


class CacheStorage:
    """Parts of the cache by layer and batch, and slots by tier. Its arguments are those of `KVCache`."""

    @whole_or_closed
    def __init__(
        self,
        layers: Mapping[int, Sequence[Sequence[CacheSegment]]],
        heads: Mapping[int, int],
        passes: Passes,
        machine: Machine,
        slots: int,
        pool: CachePool | None = None,
    ) -> None:
        self._machine = machine
        self._shared = None if pool is None else dict(pool.nbytes)  # bytes by tier that are not counted yet
        self._heads = heads
        self._passes = passes
        self._jobs = CacheJobs(machine)
        self._taken = Taken()
        self._parts: dict[tuple[int, int], list[Part]] = {
            (j, k): [] for j, batches in layers.items() for k in range(len(batches))
        }
        for batch, of_layers in enumerate(zip(*layers.values(), strict=True)):
            for of_tier in zip(*of_layers, strict=True):
                for layer, part in zip(layers, self._make_parts(of_tier), strict=True):
                    self._parts[layer, batch].append(part)
        self._made = self._parts
        self._shown: Mapping[tuple[int, int], Sequence[Part]] = self._parts
        self._rooms = self._parts  # as made: the memory of each batch, of which a smaller batch uses a part
        self.layouts = self._layouts_of(self._parts)
        """The layouts by layer and batch, with the moves for attention and back home."""
        every = [segment for batches in layers.values() for segments in batches for segment in segments]
        self._slots = {
            tier: [self._make_slot([s for s in every if s.tier is tier]) for _ in range(slots)]
            for tier in {segment.tier for segment in every}
        }

    def close(self) -> None:
        """Release all memory and files."""
        self._taken.close()

    def parts(self, cell: BoundCell) -> Sequence[Part]:
        """The parts of the cell's layer and batch."""
        return self.parts_of(cell.layer, cell.batch)

    def parts_of(self, layer: int, batch: int) -> Sequence[Part]:
        """The parts of a layer and batch."""
        return self._shown[layer, batch]

    def slot(self, tier: Tier, cell: BoundCell) -> Slot:
        """The cell's buffers for the part of a tier."""
        return self._slots[tier][cell.slot]

    def segments(self) -> dict[tuple[int, int], list[CacheSegment]]:
        """The segments by layer and batch."""
        return {key: [part.segment for part in parts] for key, parts in self._shown.items()}

    # Buffers

    def _take(self, store: Store, nbytes: int, purpose: str, copied_by_device: bool = True) -> Tensor:
        return self._taken.buffer(store, nbytes, purpose, copied_by_device)

    def _make_parts(self, segments: Sequence[CacheSegment]) -> Iterator[Part]:
        """The parts of one batch on one tier, one for each layer's segment."""
        tier, on_device = segments[0].tier, self._reaches_device(segments[0])
        sizes = [segment.nbytes for segment in segments]
        if tier is Tier.DISK:
            path = self._taken.file(self._machine.disk, "cache", sum(sizes))
            pages, purpose = [s.page_bytes for s in segments], "tails of the KV cache on disk"
            tails = self._take(self._machine.host, sum(pages), purpose, copied_by_device=on_device)
            starts = itertools.accumulate(sizes, initial=0)
            for segment, start, tail in zip(segments, starts, tails.split(pages), strict=False):
                page = tuple(pages_in(tail, segment))
                yield Part(segment, file=(path, start), tail=tail, tail_page=page)
            return
        in_use = None
        if self._grows(segments[0]):
            assert self._shared is not None
            in_use = min(sum(sizes), self._shared[tier])
            self._shared[tier] -= in_use
        homes = self._taken.buffer(self._store(tier), sum(sizes), "KV cache", on_device, in_use)
        for segment, home in zip(segments, homes.split(sizes), strict=True):
            yield Part(segment, home=home, pages=tuple(pages_in(home, segment)))

    def _store(self, tier: Tier) -> Store:
        return self._machine.device.memory if tier is Tier.GPU else self._machine.host

    def _grows(self, segment: CacheSegment) -> bool:
        """Whether the memory of the segment is taken page by page."""
        return self._shared is not None and segment.grows(self._machine.device.topology)

    def _clear(self, part: Part) -> None:
        """Give back the memory of a part that grows."""
        if part.home is not None and self._grows(part.segment):
            self._store(part.segment.tier).clear(part.home)

    def _reaches_device(self, segment: CacheSegment) -> bool:
        """Whether the compute device computes attention over the segment in some step."""
        return segment.on_device or self._passes.extends

    def _make_slot(self, segments: Sequence[CacheSegment]) -> Slot:
        """Buffers for the parts of one tier, each large enough for all layers and batches."""
        largest = max(segment.nbytes for segment in segments)
        tier, on_device = segments[0].tier, self._reaches_device(segments[0])
        topology = self._machine.device.topology
        in_device = on_device and not topology.in_place(tier) and not topology.shares_host_memory
        fresh = max(new_bytes(segment, self._passes) for segment in segments)
        return Slot(
            device=self._take(self._machine.device.memory, largest, "slots of the KV cache")
            if in_device
            else None,
            host=self._take(self._machine.host, largest, "slots of the KV cache", copied_by_device=on_device)
            if tier is Tier.DISK
            else None,
            fresh=None
            if topology.shares_host_memory or tier is Tier.GPU
            else self._take(self._machine.host, fresh, "staging of the KV cache"),
        )

    def _layouts_of(
        self, parts: Mapping[tuple[int, int], Sequence[Part]]
    ) -> dict[tuple[int, int], CacheLayout]:
        """The layouts by layer and batch."""
        layouts = {}
        for (layer, batch), some in parts.items():
            segments = tuple(part.segment for part in some)
            query_bytes = self._heads[layer] * segments[0].head_dim * segments[0].dtype.itemsize
            layouts[layer, batch] = CacheLayout(segments, query_bytes, self._machine.device.topology)
        return layouts

    # Rows that leave or move

    def regroup(self, batches: Sequence[Moved], split: Split) -> None:
        """Continue with these batches, with their rows on the tiers by `split`. No transfer may be in flight.

        Batches that stay keep their memory. The n-th batch of rows that move overwrites the n-th of the batches from
        which rows move. These batches up to the n-th are no larger than the new ones up to it, so it overwrites only
        rows that have been read. Batches of prompts that enter come last, and use the memory that is left. The
        temporary memory is at most that of one batch's rows in one layer (see `gather`). Memory that is taken page by
        page is given back, layer by layer, if no batch uses it any more.
        """
        layers = {layer for layer, _ in self._parts}
        moving = [moved for moved in batches if moved.moves]
        sources = sorted({batch for moved in moving for batch in moved.sources()})[: len(moving)]
        taken = {*sources, *(moved.whole for moved in batches)}
        left = [k for k in range(len(self._rooms) // len(layers)) if k not in taken]
        owners = [
            moved.whole if moved.whole is not None else (sources if moved.moves else left).pop(0)
            for moved in batches
        ]
        self._rooms = {(j, n): self._rooms[j, k] for j in layers for n, k in enumerate([*owners, *left])}
        parts: dict[tuple[int, int], list[Part]] = {}
        for j in layers:
            unused = [part for n in range(len(left)) for part in self._rooms[j, len(owners) + n]]
            for k, (moved, owner) in enumerate(zip(batches, owners, strict=True)):
                if moved.whole is not None:
                    parts[j, k] = self._parts[j, moved.whole]
                    continue
                tiers = split.rows(moved.count)
                rooms = [part for part in self._rooms[j, k] if tiers[part.segment.tier]]
                unused += [part for part in self._rooms[j, k] if not tiers[part.segment.tier]]
                segments = [replace(part.segment, rows=tiers[part.segment.tier]) for part in rooms]
                if moved.new:
                    before = {part.segment: part for part in self._parts.get((j, owner), ())}
                    some = zip(rooms, segments, strict=True)
                    parts[j, k] = [
                        (None if self._grows(segment) else before.get(segment))
                        or self._emptied(room, segment)
                        for room, segment in some
                    ]
                    continue
                held = gather(moved, segments, self._histories(j, moved), self._machine.device)
                parts[j, k] = [
                    self._refill(part, segment, moved.length, *both)
                    for part, segment, both in zip(rooms, segments, held, strict=True)
                ]
            for part in unused:
                self._clear(part)
        self._continue_with(parts)

    def _continue_with(self, parts: dict[tuple[int, int], list[Part]]) -> None:
        self._parts = parts
        self._show(parts)

    def _show(self, parts: Mapping[tuple[int, int], Sequence[Part]]) -> None:
        self._shown = parts
        self.layouts = self._layouts_of(parts)

    def reseat(self, moved: Reseated) -> None:
        """Copy the cached tokens of rows to their new places. The cache is in memory, on one tier."""
        for j in {layer for layer, _ in self._parts}:
            for (batch, row), (other, place) in moved.places:
                (old,), (new,) = self._parts[j, batch], self._parts[j, other]
                copy_row(old.pages, row, new.pages, place, moved.tokens)

    def divide(self, cells: Sequence[tuple[int, range]]) -> None:
        """Continue with cells that compute these rows of these batches. `parts` and `layouts` are then those of the
        cells."""
        layers = {layer for layer, _ in self._parts}
        self._show(
            {
                (j, n): [some for part in self._parts[j, k] if (some := part.only(rows))]
                for j in layers
                for n, (k, rows) in enumerate(cells)
            }
        )

    def reset(self) -> None:
        """Continue with the batches for which the cache was made, for other prompts."""
        if self._parts is self._made and self._shared is None:
            self._show(self._made)
            return
        self._rooms = self._made
        self._continue_with(self._made)
        for part in itertools.chain.from_iterable(self._made.values()):
            if self._grows(part.segment):
                self._clear(part)
                continue
            for memory in (part.home, part.tail):
                if memory is not None:  # it had other shapes: values that are not filled must be finite
                    memory.zero_()

    def cut(self, length: int, shorter: int) -> None:
        """Keep the first `shorter` of the `length` cached tokens. No transfer may be in flight.

        Later tokens overwrite the rest of a part in memory. The tail of a part on disk is read from the file.
        """
        for part in itertools.chain.from_iterable(self._parts.values()):
            page, rest = divmod(shorter, part.segment.page_tokens)
            if part.file is None or part.tail is None or not rest:
                continue
            if page < length // part.segment.page_tokens:
                path, start = part.file
                self._machine.io.read([Read(path, start + part.segment.place(page), part.tail)])

    def _histories(self, layer: int, moved: Moved) -> Iterator[tuple[int, CacheSegment, Sequence[Page]]]:
        """The parts from which rows move, with their pages in memory."""
        for batch in sorted(moved.sources()):
            for part in self._parts[layer, batch]:
                if moved.of(batch, part.segment.rows):
                    span = Span(moved.lengths[batch], 0)
                    buffers = self._slots[part.segment.tier][0]
                    if part.file is not None and buffers.host is not None:
                        self._machine.io.read(self._jobs.reads(part, buffers.host, span.length))
                    yield batch, part.segment, self._jobs.working_pages(part, buffers, span)

    def _emptied(self, part: Part, segment: CacheSegment) -> Part:
        """The part for the rows of `segment`, without tokens. It had other shapes: values that are not filled must be
        finite."""
        if part.home is not None:
            home = part.home[: segment.nbytes]
            if self._grows(segment):
                self._clear(part)
            else:
                home.zero_()
            return replace(part, segment=segment, home=home, pages=tuple(pages_in(home, segment)))
        assert part.tail is not None
        tail = part.tail[: segment.page_bytes].zero_()
        return replace(part, segment=segment, tail=tail, tail_page=tuple(pages_in(tail, segment)))

    def _refill(self, part: Part, segment: CacheSegment, length: int, k: Tensor, v: Tensor) -> Part:
        """The part, filled with the keys and values of the rows of `segment`, the last of `length` tokens."""
        span, buffers = Span(0, length), self._slots[segment.tier][0]
        part = self._emptied(part, segment)
        self._jobs.put(part, buffers, span, k, v, span.length)
        if segment.flushed(span):
            self._machine.io.write(self._jobs.flush(part, buffers, span))
        return part
