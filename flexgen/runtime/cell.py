"""The runtime's cells: one layer of one batch in one pass, with its tokens, buffers and padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flexgen.kernels.attention import hidden_positions
from flexgen.kernels.partial import Partial
from flexgen.kernels.scoring import Scoring, Window
from flexgen.layout.cache import Span
from flexgen.runtime.guesses import NewIdsOfPass
from flexgen.runtime.prefix_pages import PrefixPages


@dataclass(frozen=True)
class Padding:
    """Left padding of a batch: the number of positions before each row's first token."""

    starts: tuple[int, ...]
    on_device: Tensor
    on_host: Tensor
    _hidden: dict[tuple[range, int, torch.dtype], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def any(self) -> bool:
        return any(self.starts)

    def of(self, rows: range, device: torch.device, base: int = 0) -> Tensor | None:
        """(rows,) for attention on `device` over positions from `base` on, or None without padding and base."""
        if not self.any and not base:
            return None
        starts = (self.on_host if device.type == "cpu" else self.on_device)[rows.start : rows.stop]
        return starts - base if base else starts

    def first_visible(self, rows: range, window: Window | None, position: int) -> int:
        """The first position that a query at `position` of some row attends to, at most `position`; 0 without a
        window."""
        if window is None:
            return 0
        starts = self.starts[rows.start : rows.stop]
        if window.chunked:  # the chunks of each row begin at its first token
            return min(window.first(position - start) + start for start in set(starts))
        return min(max(min(starts), position - window.size + 1), position)

    def hidden(self, rows: range, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """The mask of `attend_fused` for attention on the device, or None without padding. Made once."""
        if not self.any:
            return None
        key = rows, tokens, dtype
        if key not in self._hidden:
            self._hidden[key] = hidden_positions(self.on_device[rows.start : rows.stop], tokens, dtype)
        return self._hidden[key]

    def hidden_in(self, window: Window, rows: range, positions: range, dtype: torch.dtype) -> Tensor | None:
        """`hidden` for the query at the last of `positions`, which include all that it attends to. None if it attends
        to the same positions in all rows."""
        starts, length = self.starts[rows.start : rows.stop], positions.stop
        if not window.chunked and max(starts) <= self.first_visible(rows, window, length - 1):
            return None
        if len(set(starts)) == 1:
            return None
        visible = window.starts(self.on_device[rows.start : rows.stop], length)
        return hidden_positions(visible - positions.start, len(positions), dtype)

    def before(self, length: int) -> Padding:
        """The padding for attention over more than `length` positions.

        A row may have only padding so far. It gets one position, because attention over no position results in NaN.
        Its result is not used.
        """
        if not self.any or max(self.starts) <= length:
            return self
        starts = tuple(min(start, length) for start in self.starts)
        return Padding(starts, self.on_device.clamp_max(length), self.on_host.clamp_max(length))


@dataclass(frozen=True, slots=True, eq=False)
class BoundCell:
    """A cell of the schedule, bound to a slot and to the tokens of its pass. All parts of a block use it.

    `token`: the new token that the pass computes, as in `Passes`, of the rows that have the most. `slot`: the number
    of its buffers. `span`: the tokens of each row that it computes. `padding`: the padding of the batch.
    `number`: the number of the pass, which is the same for all batches.
    `prefix`: the tokens that all rows share, before those of the cache.
    `guesses`: the new tokens of a pass of the decode if the block makes guesses, or if rows have different numbers of
    cached tokens.
    `column`: that of the first new token if no token of the rows is cached.
    """

    token: int
    layer: int
    batch: int
    slot: int
    span: Span
    padding: Padding
    number: int = 0
    prefix: PrefixPages | None = None
    guesses: NewIdsOfPass | None = None
    column: int = 0

    def lengths(self, rows: range) -> Tensor | int:
        """The column of the first new token: that of each row, (rows,) int64 in host memory, or of all rows.

        Only jobs of the cell may read those of each row, because the pass before sets them.
        """
        if self.guesses is not None:
            return self.guesses.lengths[rows.start : rows.stop]
        return self.column or self.span.length

    def contexts(self, rows: range) -> Tensor:
        """(rows,) int64 in host memory: the columns of each row that attention reads before the new tokens, if rows
        have different numbers of cached tokens.

        They are those of `lengths`, except for a row that gets no token. It has its padding only: its result is not
        used, so attention need not read its cache. Jobs of the cell may call it, see `lengths`.
        """
        assert self.guesses is not None
        here = slice(rows.start, rows.stop)
        return torch.where(self.guesses.idle[here], self.padding.on_host[here], self.guesses.lengths[here])

    def own(self, scoring: Scoring) -> Scoring:
        """The scoring of attention over the tokens of the cache."""
        return scoring if self.prefix is None else scoring.after(self.prefix.length)

    def attend_prefix(
        self, q: Tensor, scoring: Scoring, rows: slice = slice(None), done: int = 0
    ) -> list[Partial]:
        """Attention over the shared prefix, in parts. There is none without a prefix.

        q (rows, heads, new, head_dim): the queries of some rows, after the first `done` new tokens of each.
        """
        if self.prefix is None:
            return []
        positions = None
        if scoring.window is not None or scoring.slopes:
            lengths = self.span.length if self.guesses is None else self.guesses.lengths[rows]
            # The lengths of single rows are in host memory, so their padding has to be too.
            starts = self.padding.on_device if self.guesses is None else self.padding.on_host
            positions = self.prefix.length + lengths + done - starts[rows]
        return self.prefix.attend(q, scoring, positions)
