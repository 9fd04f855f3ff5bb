"""Compaction: the cache of the rows that `schedule/admission.py` puts together moves into their new batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.layout.cache import CacheSegment
from flexgen.memory.device import ComputeDevice
from flexgen.policy import Tier
from flexgen.runtime.pages import Page, pick
from flexgen.schedule.admission import Place


@dataclass(frozen=True)
class Moved:
    """A batch that consists of rows of the previous batches.

    `rows`: the previous (batch, row in the batch) of each row. `lengths`: the cached columns of each previous batch.
    `length`: the cached columns of this one. All rows of a previous batch move by the same number of columns: without
    guesses, they all end in the same column, and with guesses, their prompts do. `whole`: the number of the previous
    batch, if this one has exactly its rows. `new`: the number of rows of a batch of prompts that enter, which has no
    previous rows and no cached columns.
    """

    rows: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    length: int
    whole: int | None
    new: int = 0

    @classmethod
    def entering(cls, rows: int, lengths: tuple[int, ...] = ()) -> Moved:
        """A batch of prompts that enter."""
        return cls((), lengths, 0, None, rows)

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.rows) or self.new

    @property
    def moves(self) -> bool:
        """Whether cached tokens must be copied."""
        return self.whole is None and not self.new

    def sources(self) -> set[int]:
        """The previous batches of the rows."""
        return {batch for batch, _ in self.rows}

    def of(self, batch: int, within: range) -> list[int]:
        """The rows of `batch` that move, if they are in `within`."""
        return [row for source, row in self.rows if source == batch and row in within]


class Reseated(NamedTuple):
    """Rows that continue in other places of a block.

    places: the old and the new place of each. The new places are free before the move.
    tokens: the columns of the cache that the longest of these rows has.
    """

    places: Sequence[tuple[Place, Place]]
    tokens: int


def gather(
    moved: Moved,
    segments: Sequence[CacheSegment],
    sources: Iterable[tuple[int, CacheSegment, Sequence[Page]]],
    device: ComputeDevice,
) -> list[tuple[Tensor, Tensor]]:
    """Stored keys and values (rows, kv_heads, tokens, width) for each of the new batch's `segments`: the last tokens
    of the batch that the segment stores.

    They are in the memory of the segment's tier; for the disk tier, in host memory. sources: the parts of the
    previous batches, with their pages in memory. A part may become invalid when the next one is requested. Columns
    that a row does not have are zero.
    """
    held = [_zeros(segment, segment.stored(moved.length), device) for segment in segments]
    for batch, old, pages in sources:
        shift = moved.length - moved.lengths[batch]
        # The columns before these were padding for rows that have left, or are no longer in a ring.
        first = max(-shift, old.full_pages(moved.lengths[batch]).start * old.page_tokens)
        for segment, both in zip(segments, held, strict=True):
            here = [moved.rows[n] for n in segment.rows]
            places = [n for n, (source, row) in enumerate(here) if source == batch and row in old.rows]
            if not places:
                continue
            rows = [here[n][1] - old.rows.start for n in places]
            carry = _carrier(old, segment, device)
            origin = moved.length - both[0].shape[2]
            begin = max(first, origin - shift)
            for column, *parts in pick(pages, rows, begin, moved.lengths[batch]):
                for target, part in zip(both, parts, strict=True):
                    begin = column + shift - origin
                    stored = _recoded(part, old, segment)
                    columns = slice(begin, begin + stored.shape[2])
                    for place, some in _adjacent(places):
                        carry(target[place, :, columns], stored[some])
    return held


def _adjacent(places: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The runs of adjacent places, and their indices in `places`."""
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            yield slice(places[begin], places[end - 1] + 1), slice(begin, end)
            begin = end


def _on_device(segment: CacheSegment, device: ComputeDevice) -> bool:
    return segment.tier is Tier.GPU and not device.shares_host_memory


def _zeros(segment: CacheSegment, tokens: int, device: ComputeDevice) -> tuple[Tensor, Tensor]:
    shape = (2, len(segment.rows), segment.kv_heads, tokens, segment.heads.width)
    where = device.torch_device if _on_device(segment, device) else torch.device("cpu")
    both = torch.zeros(shape, dtype=segment.heads.dtype, device=where)
    return both[0], both[1]


def _recoded(stored: Tensor, old: CacheSegment, new: CacheSegment) -> Tensor:
    """Keys or values in the stored form of the new segment. If the codec changes, they are decoded and encoded."""
    if old.heads == new.heads:
        return stored
    return new.heads.encode(torch.cat(list(old.heads.decode(stored, stored.shape[2], old.dtype)), dim=2))


def _carrier(
    old: CacheSegment, new: CacheSegment, device: ComputeDevice
) -> Callable[[Tensor, Tensor], object]:
    """A function that copies (target, source) from one segment's memory to another's, over the link if needed."""

    def over_the_link(target: Tensor, source: Tensor) -> None:
        staged = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        move = device.to_device if _on_device(new, device) else device.from_device
        move(staged, source.contiguous())
        device.settle()
        target.copy_(staged)

    return Tensor.copy_ if _on_device(old, device) == _on_device(new, device) else over_the_link
