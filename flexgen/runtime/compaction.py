"""Rows that have stopped leave their batches: when that pays, and how the cache of the others moves together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.layout.cache import CacheSegment
from flexgen.memory.device import ComputeDevice
from flexgen.policy import Tier
from flexgen.runtime.pages import Page, pick

_PAID_BACK = 2
"""Tokens after which a move is paid back. It reads and writes the cache of the remaining rows once; with at most
half of the rows left, each later token reads at least as many bytes less."""


def regrouped(
    batches: Sequence[Sequence[int]], stopped: Sequence[bool], tokens_left: int
) -> list[list[int]] | None:
    """The rows of each batch for the tokens to come; [] if every row has stopped, None to continue as before.

    `batches` hold numbers of rows, `stopped` is by that number. When at most half of the rows that are computed
    still run, these move together into full batches. So a move is of at most half as many rows as the one
    before, and all of them cost no more than one of the whole block. Batches stay as large as they were, so
    that weights serve as many rows at once. A batch without a row that still runs is left out at any time: that
    moves nothing.
    """
    live = [[row for row in batch if not stopped[row]] for batch in batches]
    rows = [row for batch in live for row in batch]
    if rows and 2 * len(rows) <= sum(map(len, batches)) and tokens_left >= _PAID_BACK:
        size = max(map(len, batches))
        return [rows[n : n + size] for n in range(0, len(rows), size)]
    if all(live):
        return None
    return [list(batch) for batch, going in zip(batches, live, strict=True) if going]


@dataclass(frozen=True)
class Moved:
    """A batch that is put together from rows of the batches before.

    `rows`: (batch, row in it) of each, in that order. `lengths`: cached columns of each of those batches, and
    `length` of this one. All rows of a batch end in the same column, so they all move by the same number of
    columns. `whole`: the batch that this one has been, if it has all of its rows.
    """

    rows: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    length: int
    whole: int | None

    def sources(self) -> set[int]:
        """The batches that rows come from."""
        return {batch for batch, _ in self.rows}

    def of(self, batch: int, within: range) -> list[int]:
        """The rows of `batch` that move, of those in `within`."""
        return [row for source, row in self.rows if source == batch and row in within]


def gather(
    moved: Moved,
    segments: Sequence[CacheSegment],
    sources: Iterable[tuple[int, CacheSegment, Sequence[Page]]],
    device: ComputeDevice,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, as they are kept, (rows, kv_heads, length, width), of each of the new batch's `segments`.

    They are in the memory of the segment's tier, for disk in host memory. `sources` are the parts of the old
    batches, their pages in memory; a part may be gone when the next one is asked for. Columns that a row did not
    have are zero.
    """
    held = [_zeros(segment, moved.length, device) for segment in segments]
    for batch, old, pages in sources:
        shift = moved.length - moved.lengths[batch]
        first = max(-shift, 0)  # columns before it were padding of rows that have gone
        for segment, both in zip(segments, held, strict=True):
            here = [moved.rows[n] for n in segment.rows]
            places = [n for n, (source, row) in enumerate(here) if source == batch and row in old.rows]
            if not places:
                continue
            rows = [here[n][1] - old.rows.start for n in places]
            carry = _carrier(old, segment, device)
            for column, *parts in pick(pages, rows, first, moved.lengths[batch]):
                for target, part in zip(both, parts, strict=True):
                    begin = column + shift
                    kept = _recoded(part, old, segment)
                    carry(target[places[0] : places[-1] + 1, :, begin : begin + kept.shape[2]], kept)
    return held


def _on_device(segment: CacheSegment, device: ComputeDevice) -> bool:
    return segment.tier is Tier.GPU and not device.shares_host_memory


def _zeros(segment: CacheSegment, tokens: int, device: ComputeDevice) -> tuple[Tensor, Tensor]:
    shape = (2, len(segment.rows), segment.kv_heads, tokens, segment.heads.width)
    where = device.torch_device if _on_device(segment, device) else torch.device("cpu")
    both = torch.zeros(shape, dtype=segment.heads.dtype, device=where)
    return both[0], both[1]


def _recoded(kept: Tensor, old: CacheSegment, new: CacheSegment) -> Tensor:
    """Keys or values as the new segment keeps them; rows that change their codec are decoded and encoded."""
    if old.heads == new.heads:
        return kept
    return new.heads.encode(torch.cat(list(old.heads.decode(kept, kept.shape[2], old.dtype)), dim=2))


def _carrier(
    old: CacheSegment, new: CacheSegment, device: ComputeDevice
) -> Callable[[Tensor, Tensor], object]:
    """Copies (target, source) from the memory of one segment to that of another, over the link if it must."""

    def over_the_link(target: Tensor, source: Tensor) -> None:
        staged = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        move = device.to_device if _on_device(new, device) else device.from_device
        move(staged, source.contiguous())
        device.settle()
        target.copy_(staged)

    return Tensor.copy_ if _on_device(old, device) == _on_device(new, device) else over_the_link
