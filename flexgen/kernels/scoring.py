"""The steps from products of queries and keys to attention probabilities, as each layer defines them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_Positions = TypeVar("_Positions", int, Tensor)

Length = int | Tensor
"""A number of positions: that of all rows, or int64 (rows,) with the number of each row, at least 1."""


def longest(length: Length, places: int) -> int:
    """The largest of the rows' lengths. For lengths on a GPU it is the limit `places`: to read them is to wait."""
    if isinstance(length, int):
        return length
    if length.device.type != "cpu":
        return places
    return max(length.tolist(), default=places)  # unlike operations of torch, it can be part of a tape


class Window(NamedTuple):
    """The positions that a query attends to: at most `size`, the last of them its own.

    chunked: a text is divided into chunks of `size` positions, and a query attends to positions of its own chunk.
    Otherwise a query attends to the last `size` positions. before: the number of tokens that precede a row and are
    stored elsewhere (a shared prefix). Chunks begin at the first of them.
    """

    size: int
    chunked: bool = False
    before: int = 0

    def first(self, position: int) -> int:
        """The first position that the query at `position` attends to. Positions count from the start of the row."""
        return max(self.begin(position), 0)

    def begin(self, position: _Positions) -> _Positions:
        """The first position of the window of the query at `position`. It may be negative, before the row."""
        if self.chunked:
            return (position + self.before) // self.size * self.size - self.before
        return position - self.size + 1

    def starts(self, starts: Tensor, length: Length) -> Tensor:
        """The first visible position of each row for the query at position length - 1.

        starts (rows,): the positions of the rows' first tokens, which may be negative. Positions count from the start
        of the cache, here and in the result.
        """
        if self.chunked:
            return torch.maximum(starts + self.begin(length - 1 - starts), starts)
        return starts.clamp_min(length - self.size)


@dataclass(frozen=True, eq=False)
class Scoring:
    """How a layer computes attention probabilities.

    A score is the product of query and key times `scale`. With `cap`, it becomes cap * tanh(score / cap). With
    `slopes`, one for each head, slope * (key position - query position) is added (ALiBi). Outside of `window`,
    probabilities are zero. `sinks` (heads,) are additional scores that take part in the softmax, but have no value.
    """

    scale: float
    cap: float | None = None
    slopes: tuple[float, ...] = ()
    window: Window | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the scores are only scaled and masked."""
        return self.cap is None and not self.slopes and self.sinks is None

    def after(self, prefix: int) -> Scoring:
        """The scoring of a row's own tokens, if `prefix` tokens that precede them are stored elsewhere.

        It has the sinks. So `attend_prefix` leaves them out.
        """
        if self.window is None or not self.window.chunked or not prefix:
            return self
        return replace(self, window=self.window._replace(before=self.window.before + prefix))


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of "Train Short, Test Long" (arXiv 2108.12409): a geometric sequence from 2 ** (-8 / heads).

    If `heads` is no power of two, the other heads have every second slope of the sequence for the next power of two.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * n / power) for n in range(1, power + 1)]
    between = [2.0 ** (-4.0 * n / power) for n in range(1, 2 * (heads - power), 2)]
    return tuple(slopes + between)


def visible_from(
    window: Window | None, starts: Tensor | None, length: Length, rows: int, device: torch.device
) -> Tensor | None:
    """The first visible position of each row for the query at position length - 1, (rows,) int64; None for 0.

    starts: as for `Window.starts`; None for 0. Lengths of rows are on the device of `starts`.
    """
    if window is None:
        return starts
    if starts is None:
        if isinstance(length, int) and length + window.before <= window.size:
            return None
        starts = torch.zeros(rows, dtype=torch.int64, device=device)
    return window.starts(starts, length).clamp_min(0)


@functools.lru_cache(maxsize=32)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as a float32 tensor on `device`. Do not modify it."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def capped(scores: Tensor, cap: float) -> Tensor:
    """cap * tanh(scores / cap), in place."""
    return scores.div_(cap).tanh_().mul_(cap)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of float32 scores (rows, heads, queries, keys) over the keys; a sink reduces their probabilities.

    Rows with only -inf result in NaN without a sink, and in zero with one.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    extra = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, extra), dim=-1), dim=-1)[..., :-1]


def softmax_part(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """`softmax_with_sinks`, and the log-sum-exp of the scores and the sink, (rows, heads, queries).

    Rows with only -inf result in zero.
    """
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(1, -1, 1))
    return (scores - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).exp_(), lse


def bend(scores: Tensor, slopes: tuple[float, ...], queries: range | Tensor, keys: range) -> None:
    """Add ALiBi's bias to `scores` (rows, heads, queries, keys) in place, for these positions.

    queries: a range, or the position of the only query of each row, (rows,).
    """
    device = scores.device
    k = torch.arange(keys.start, keys.stop, device=device)
    if isinstance(queries, Tensor):
        q = queries[:, None, None, None]
    else:
        q = torch.arange(queries.start, queries.stop, device=device)[:, None]
    scores += constants(slopes, device)[:, None, None] * (k - q)


def visible(window: Window | None, queries: range, keys: range, start: int, device: torch.device) -> Tensor:
    """Whether each of `queries` attends to each of `keys`, (queries, keys) bool. Both are positions without padding.

    start: the position of the row's first token, as in `causal_attention`.
    """
    q = torch.arange(queries.start, queries.stop, device=device)[:, None]
    k = torch.arange(keys.start, keys.stop, device=device)
    if window is None:
        return k <= q
    if window.chunked:
        origin = start - window.before
        return (k <= q) & (k >= (q - origin).div(window.size, rounding_mode="floor") * window.size + origin)
    return (k <= q) & (k > q - window.size)
