"""Guesses of the next tokens of a row, which a pass of the decode computes together with the row's newest token.

A pass computes the newest id of each row and up to `guess` ids that may follow it. The head then chooses an id at
each of these positions, as without guesses. A guess is kept if it equals the id that was chosen before it, so each
row gets the same ids as without guesses, in fewer passes. The next pass overwrites the keys and values of the others.

A pass computes the guesses of a batch only if enough of them will be right, by those of earlier passes. Otherwise it
computes one token of each row, like a pass without guesses, and only compares the guesses with the chosen ids.

The default guesses copy what followed an earlier occurrence of the newest ids (prompt lookup decoding, Saxena, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flexgen.layout.cache import Span
from flexgen.layout.passes import LEAST_RIGHT

Propose = Callable[[np.ndarray, int], Sequence[int]]
"""From the ids of a row so far (int64) and a number of tokens: guesses for the next ids, at most this number, each
an id of the model."""

_LOOKED_UP = 3
"""The newest ids that must occur earlier. With two, many guesses in ordinary text are wrong."""

_NEWEST = 0.25
"""The weight of the newest guess in the share of right ones, which may change within a few tokens."""


def copied(ids: np.ndarray, count: int) -> Sequence[int]:
    """The ids that followed the latest earlier occurrence of the last `_LOOKED_UP` of `ids`, at most `count`."""
    last = len(ids) - _LOOKED_UP
    if last < 1:
        return ()
    equal = ids[:last] == ids[last]
    for n in range(1, _LOOKED_UP):
        equal &= ids[n : last + n] == ids[last + n]
    found = np.flatnonzero(equal)
    if not len(found):
        return ()
    after = int(found[-1]) + _LOOKED_UP
    guesses: list[int] = ids[after : after + count].tolist()
    return guesses


@dataclass(eq=False)
class NewIdsOfPass:
    """The new tokens of a batch in one pass of the decode.

    newest (rows, 1) int64: the newest id of each row. ids (rows, 1 + guess): the same with the guesses after it; rows
    with fewer guesses have any ids at the end. lengths (rows,) int64: the columns of the cache before them. All are
    in host memory. guessed: the number of guesses of each row. first: the number of the new token that follows the
    newest id. idle (rows,) bool: the rows that get no token: they have ended, or their prompt is not computed
    yet. The previous pass of the batch fills these before a job of this pass reads them.

    span: the columns for which data moves. Its length is at least that of the longest row. drawn (rows, new): the
    chosen ids in host memory. `Guesses.bind` sets both.
    """

    newest: Tensor
    ids: Tensor
    lengths: Tensor
    guessed: list[int]
    first: list[int]
    idle: Tensor
    span: Span = Span(0, 0)
    drawn: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def computed(self) -> Tensor:
        """The ids (rows, new) that the pass computes."""
        return self.ids if self.span.guessed else self.newest


class Rows(Protocol):
    """The rows of a GPU batch (see `prompts.Batch`)."""

    @property
    def rows(self) -> tuple[int, ...]: ...

    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class _Known:
    """What is known before pass `token` of a batch: the columns of the longest row; whether it computes guesses."""

    token: int
    longest: int
    guesses: bool = False


class _Passes:
    """The passes of one batch."""

    def __init__(self, batch: Rows, guess: int) -> None:
        # Not the batch: the passes of one that has ended must not keep it.
        self._rows, self._width = len(batch.rows), batch.width
        self._guess = guess
        self._by_token: dict[int, NewIdsOfPass] = {}
        self.known = _Known(1, batch.width)

    def of(self, token: int) -> NewIdsOfPass:
        """The pass that computes new token `token` of a row without guesses. It is made when it is first needed, by
        the thread that issues steps or by the one that stores the ids of the pass before."""
        found = self._by_token.get(token)
        if found is None:
            found = self._by_token.setdefault(token, self._make(token))
            for old in [other for other in list(self._by_token) if other < token - 1]:
                self._by_token.pop(old, None)
        return found

    def _make(self, token: int) -> NewIdsOfPass:
        rows = self._rows
        newest, ids = (torch.zeros(rows, n, dtype=torch.int64) for n in (1, 1 + self._guess))
        lengths = torch.full((rows,), self._width, dtype=torch.int64)
        idle = torch.zeros(rows, dtype=torch.bool)
        return NewIdsOfPass(newest, ids, lengths, [0] * rows, [token] * rows, idle)


class _Right:
    """The share of a row's guesses that were right, of those that followed right ones. It begins at one half."""

    def __init__(self) -> None:
        self.share = 0.5

    def add(self, right: bool) -> None:
        self.share += _NEWEST * (right - self.share)

    def expected(self, guesses: int) -> float:
        """The expected number of right ones: each of `guesses` is right only if those before it are."""
        return sum(self.share**n for n in range(1, guesses + 1))


class Guesses:
    """The guesses for the rows of one block, and the ids from which they are made.

    prompts: the ids of each prompt, with those of a shared prefix. tokens: the number of new tokens of each row.
    guess: the maximum number of guesses of a row in a pass. `made`, `kept`: the numbers of guesses that passes have
    computed so far, and of those that were right.
    """

    def __init__(
        self, prompts: Sequence[np.ndarray], tokens: int, guess: int, propose: Propose = copied
    ) -> None:
        self.guess = guess
        self.tokens = tokens
        self.made = 0
        self.kept = 0
        self._propose = propose
        self._counts = [len(prompt) for prompt in prompts]
        self._lengths = list(self._counts)
        self._ids = [np.concatenate([prompt, np.zeros(tokens, np.int64)]) for prompt in prompts]
        self._right = [_Right() for _ in prompts]
        self._ended: Collection[int] = ()
        self._passes: WeakKeyDictionary[Rows, _Passes] = WeakKeyDictionary()

    def _of(self, batch: Rows) -> _Passes:
        passes = self._passes.get(batch)
        return self._passes.setdefault(batch, _Passes(batch, self.guess)) if passes is None else passes

    def bind(self, batch: Rows, token: int) -> NewIdsOfPass:
        """The pass of `batch` that computes token `token`, with its span.

        Called when the steps of the pass are issued. The ids of earlier passes may not be known yet, so the span has
        the most columns that the rows can have by then. The width of the pass depends on the guesses that are known.
        """
        passes = self._of(batch)
        found, known = passes.of(token), passes.known
        if not found.span.new:
            most = known.longest + (token - known.token) * (1 + self.guess)
            new = 1 + self.guess if known.guesses else 1
            found.drawn = torch.zeros(len(batch.rows), new, dtype=torch.int64)
            found.span = Span(min(most, batch.width + self.tokens - 1), new, guessed=new - 1)
        return found

    def start(self, batch: Rows, ids: Sequence[int], ended: Collection[int]) -> None:
        """Accept the first new id of each row of the batch. ended: the rows that have ended."""
        for row, id in zip(batch.rows, ids, strict=True):
            self._add(row, id)
        self._ended = ended
        self._follow(batch, 1)

    def move(self, batch: Rows, token: int) -> int:
        """Continue with pass `token` of a new batch of rows that had others before. Returns the columns of the cache
        that its longest row has."""
        self._follow(batch, token)
        return self._of(batch).known.longest

    def seat(self, batch: Rows, token: int) -> None:
        """Continue with pass `token` of a batch that has other rows, or whose prompts were not all computed before.

        A row whose prompt is not computed yet stays in a column that no token uses.
        """
        self._passes.pop(batch, None)
        self._follow(batch, token)

    def accepted(
        self, batch: Rows, token: int, drawn: Sequence[Sequence[int]]
    ) -> tuple[Sequence[int], list[list[int]]]:
        """The ids that each row has got in pass `token`, and the number of the first of them, for `drawn`, the ids
        chosen at each of its positions."""
        now = self._of(batch).of(token)
        got: list[list[int]] = []
        for row, ids, chosen, guessed in zip(batch.rows, now.ids.tolist(), drawn, now.guessed, strict=True):
            kept, asked, right = 0, min(guessed, now.span.new - 1), self._right[row]
            while kept < asked and ids[kept + 1] == chosen[kept]:
                kept += 1
                right.add(True)
            if kept < guessed:  # also if the pass has not computed them
                right.add(ids[kept + 1] == chosen[kept])
            got.append(list(chosen[: kept + 1]))
            self.made += asked
        return now.first, got

    def advance(self, batch: Rows, token: int, ids: Sequence[Sequence[int]], ended: Collection[int]) -> None:
        """Accept the new ids of each row in pass `token`, none for a row that ended before, and make the next
        guesses."""
        for row, some in zip(batch.rows, ids, strict=True):
            for id in some:
                self._add(row, id)
            self.kept += max(len(some) - 1, 0)
        self._ended = ended
        self._follow(batch, token + 1)

    def new(self, row: int) -> int:
        """The number of new tokens of a row so far."""
        return self._lengths[row] - self._counts[row]

    def _add(self, row: int, id: int) -> None:
        self._ids[row][self._lengths[row]] = id
        self._lengths[row] += 1

    def _follow(self, batch: Rows, token: int) -> None:
        """Fill the pass `token` of a batch."""
        passes = self._of(batch)
        following, expected, computed = passes.of(token), 0.0, list[list[int]]()
        for n, row in enumerate(batch.rows):
            so_far, new = self._ids[row][: self._lengths[row]], self.new(row)
            # The last token of a row needs no guess after it.
            most = 0 if row in self._ended else max(min(self.guess, self.tokens - new - 1), 0)
            guesses = list(self._propose(so_far, most))[:most] if most else []
            following.guessed[n], following.first[n] = len(guesses), new
            computed.append([int(so_far[-1]), *guesses, *[int(so_far[-1])] * (self.guess - len(guesses))])
            expected += self._right[row].expected(len(guesses))
        following.ids.copy_(torch.tensor(computed))
        following.newest.copy_(following.ids[:, :1])
        # The newest id of a row is not in the cache yet. All prompts of a batch end in the same column.
        unused = batch.width + self.tokens - 1
        lengths = [batch.width + new - 1 if new else unused for new in following.first]
        following.lengths.copy_(torch.tensor(lengths))
        live = sum(row not in self._ended for row in batch.rows)
        idle = [row in self._ended or not new for row, new in zip(batch.rows, following.first, strict=True)]
        following.idle.copy_(torch.tensor(idle))
        passes.known = _Known(token, max(lengths), expected > 0 and expected >= LEAST_RIGHT * live)
