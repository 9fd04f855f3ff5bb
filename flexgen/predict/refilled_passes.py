"""The passes of a block in which rows end early and prompts that wait enter.

They are those of the runtime, from the same rules (`schedule/admission.py`), for given lengths of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from flexgen.layout.cache_pool import CachePool
from flexgen.layout.passes import Passes
from flexgen.layout.plan import batch_sizes
from flexgen.policy import Policy
from flexgen.results.report import Stage
from flexgen.schedule.admission import between, closed_up, entry_cells, gathered, movers, regrouped, reseated
from flexgen.schedule.seats import Seats


@dataclass(frozen=True)
class RefilledPass:
    """One pass of a block.

    Of each cell of a layer:

    rows: the number of its rows.
    tokens: the new token of the rows that have the most, as in `Passes`; if prompts enter in the places of single
        rows, the mean. Up to 0 if the cell computes prompts, or rows that are computed again.
    attending: the number of rows that get a token, whose cache attention reads.

    Of the block:

    live: the number of rows that get a new token.
    moved: the cached tokens that were copied before the pass, summed over rows.
    begins: whether a run begins with the pass, because the batches before it were others.
    cut: whether its run ends with the pass and before the last pass of its grid, so that loads for the next pass have
        been issued.
    put_back: the number of rows that are put back to wait after the pass.
    loaded: whether the run before has loaded the first weights for the pass (`runtime/weights_ahead.py`).
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    attending: tuple[int, ...]
    live: int
    stage: Stage
    moved: int = 0
    begins: bool = True
    cut: bool = True
    put_back: int = 0
    loaded: bool = False

    @property
    def entering(self) -> int:
        """The number of cells that compute prompts."""
        return sum(token <= 0 for token in self.tokens)

    @property
    def kind(self) -> tuple[int, int, bool, bool, bool]:
        """Passes of one kind differ in the lengths of their rows, and little in the number of rows.

        While the pass before computed prompts, the first weights may have been loaded.
        """
        after_prompts = not self.begins and 1 in self.tokens
        return len(self.tokens), self.entering, self.begins, self.loaded, after_prompts

    def cached_tokens(self, width: int) -> int:
        """The cached tokens that attention reads, for prompts of `width` tokens.

        A part of a prompt adds its number, which is negative and grows with the tokens before it. The seconds of
        passes of one kind are nearly linear in the sum.
        """
        cells = zip(self.attending, self.tokens, strict=True)
        return sum(rows * (width + token) if token > 0 else token for rows, token in cells)


def refilled_passes(
    answers: Sequence[int], policy: Policy, passes: Passes, pool: CachePool | None = None
) -> Iterator[RefilledPass]:
    """The passes of a block whose prompts have these numbers of new tokens, up to the end of the last row.

    pool: the pages that its batches share; None if each batch has all of its own.
    """
    if passes.rows:
        return _ByPlace(answers, policy, passes).run()
    return _ByBatch(answers, policy, passes, pool).run()


class _ByBatch:
    """A block in which prompts enter in whole batches."""

    def __init__(
        self, answers: Sequence[int], policy: Policy, passes: Passes, pool: CachePool | None
    ) -> None:
        sizes = batch_sizes(policy, len(answers))
        seated, prompts = sum(sizes), range(len(answers))
        self._answers = answers
        self._guesses = policy.guess > 0
        self._passes = passes
        self._pool = pool
        self._places = len(sizes)
        self._batches = _consecutive(sizes)
        self._waiting = [list(prompts[n : n + sizes[0]]) for n in prompts[seated :: sizes[0]]]
        self._entered = False  # whether prompts that waited have entered
        self._number = 0  # of the present pass
        # The pass that computes the first new token of each row in the block after the row has entered.
        self._began = dict.fromkeys(range(seated), -passes.first)
        self._made = [0] * len(answers)  # the new tokens of each row before it was put back
        self._ended = [False] * len(answers)

    def run(self) -> Iterator[RefilledPass]:
        begins, loaded, moved = True, False, 0
        while self._batches:
            rows, tokens, live = tuple(map(len, self._batches)), self._tokens(), self._rows_with_a_token()
            for row, origin in zip(live, self._origins(live), strict=True):
                self._ended[row] = self._number + 1 - origin >= self._answers[row]
            last = self._ends_grid()
            following, put_back = self._following(last)
            changed = following != self._batches
            cut = changed and not last
            yield RefilledPass(
                rows,
                tokens,
                rows,
                len(live),
                self._stage,
                moved=moved,
                begins=begins,
                cut=cut,
                put_back=sum(map(len, put_back)),
                loaded=loaded,
            )
            # If only prompts that waited are left, they begin with passes of their own numbers (`Prompts.restart`).
            here = {row for batch in self._batches for row in batch}
            loaded = cut and any(row in here for batch in following for row in batch)
            self._put_back(put_back)
            begins, moved = changed, self._seat(following) if changed else 0
            self._number += 1

    @cached_property
    def _longest(self) -> int:
        return max(self._answers)

    @property
    def _stage(self) -> Stage:
        if not self._entered:
            return Stage.FILL
        return Stage.STEADY if self._waiting else Stage.DRAIN

    def _first(self, batch: Sequence[int]) -> int:
        """The pass that computes the first new token of the rows of a batch that entered first."""
        return min(map(self._began.__getitem__, batch))

    def _origins(self, rows: Sequence[int]) -> list[int]:
        """The pass that would have computed token 0 of each row if the row had never been put back."""
        began, made = self._began, self._made
        return [began[row] - made[row] for row in rows]

    def _tokens(self) -> tuple[int, ...]:
        """The token of each batch, see `RefilledPass`."""
        return tuple(
            self._number - min(self._origins(batch))
            if (first := self._first(batch)) < self._number
            else max(self._number - first, self._passes.first)
            for batch in self._batches
        )

    def _rows_with_a_token(self) -> list[int]:
        """The rows that get a new token in the present pass."""
        rows = chain.from_iterable(self._batches)
        return [row for row in rows if not self._ended[row] and self._began[row] <= self._number]

    def _ends_grid(self) -> bool:
        """Whether the present pass is the last one of its grid, as in `NewTokens.following`: after it, a row has as
        many tokens as the longest answer, or would have if it had not ended."""
        return self._number + 1 - min(self._origins([*chain(*self._batches)])) >= self._longest

    def _following(self, last: bool) -> tuple[list[list[int]], list[list[int]]]:
        """The batches of the next pass, and the rows that are put back to wait, batch by batch.

        last: whether the present pass ends its grid.
        """
        kept = self._kept(last)
        if self._pool is None:
            if kept is None:
                return self._batches, []
            return [*kept, *self._waiting[: self._places - len(kept)]], []
        lengths = [self._passes.width + made for made in self._made]
        seats = Seats(self._places, self._number, lengths, self._began, self._pool.fits)
        following, put_back = seats.following(self._batches if kept is None else kept, self._waiting)
        return following, [[row for row in batch if not self._ended[row]] for batch in put_back]

    def _kept(self, last: bool) -> list[list[int]] | None:
        """The batches without rows that have ended, as `regrouped` and `gathered` return them; None for no change."""
        entering = [k for k, batch in enumerate(self._batches) if self._first(batch) > self._number]
        if last and not self._guesses:
            return gathered(self._batches, self._ended, entering)
        live = [row for batch in self._batches for row in batch if not self._ended[row]]
        left = max(self._origins(live)) + self._longest - self._number - 1 if live else 0
        return regrouped(self._batches, self._ended, left, entering, bool(self._waiting))

    def _put_back(self, batches: Sequence[Sequence[int]]) -> None:
        """Let these rows wait after the present pass, before all others."""
        for rows in batches:
            for row in rows:
                self._made[row] += max(self._number + 1 - self._began.pop(row), 0)
            self._waiting.insert(0, sorted(rows, key=self._made.__getitem__))

    def _seat(self, following: list[list[int]]) -> int:
        """Continue with these batches after the present pass. Returns the cached tokens of the rows that move."""
        moved, before = 0, {frozenset(batch) for batch in self._batches}
        for batch in following:
            if batch[0] not in self._began:
                self._waiting.remove(batch)
                width = self._passes.width + max(self._made[row] for row in batch)
                self._began.update(dict.fromkeys(batch, self._number + 1 - self._passes.first_of(width)))
                self._entered = True
            elif frozenset(batch) not in before:
                moved += sum(
                    self._passes.width + self._number + 1 - origin for origin in self._origins(batch)
                )
        self._batches = following
        return moved


class _Cell(NamedTuple):
    """A cell of a `RefilledPass`."""

    rows: int
    token: int
    attending: int


class _ByPlace:
    """A block in which prompts enter in the places of single rows."""

    def __init__(self, answers: Sequence[int], policy: Policy, passes: Passes) -> None:
        self._answers = answers
        self._passes = passes
        self._sizes = batch_sizes(policy, len(answers))
        self._batches = _consecutive(self._sizes)
        self._new = [0] * len(answers)  # the new tokens of each row
        self._seated = sum(self._sizes)  # prompts that have or had a place; those with later numbers wait

    def run(self) -> Iterator[RefilledPass]:
        begins, loaded, moved = True, False, 0
        while any(self._batches):
            decoding, entry = self._decoding(), self._entry()
            entering = [_Cell(len(places), 0, len(places)) for _, places in entry]
            rows, tokens, attending = zip(*between(self._decode_cells(decoding), entering), strict=True)
            left = max(self._answers) - min(self._new[row] for row in chain.from_iterable(self._batches))
            live = list(chain.from_iterable(decoding))
            live += (row for k, places in entry for row in self._batches[k][places.start : places.stop])
            for row in live:
                self._new[row] += 1
            following = self._following()
            changed = bool(entry) or following != self._batches
            cut = changed and left > 1
            yield RefilledPass(
                rows,
                tokens,
                attending,
                len(live),
                self._stage,
                moved=moved,
                begins=begins,
                cut=cut,
                loaded=loaded,
            )
            moving = movers(self._batches, following, self._new)
            moved = sum(self._passes.width + self._new[row] for row in moving)
            self._batches, begins, loaded = following, changed, cut
            self._seated = max([self._seated, *(1 + row for row in chain.from_iterable(following))])

    @property
    def _waiting(self) -> Sequence[int]:
        return range(self._seated, len(self._answers))

    @property
    def _stage(self) -> Stage:
        if self._seated == sum(self._sizes):
            return Stage.FILL
        return Stage.STEADY if self._waiting else Stage.DRAIN

    def _decoding(self) -> list[list[int]]:
        """The rows of each batch that get a token and whose prompts were computed before."""
        return [[row for row in batch if 0 < self._new[row] < self._answers[row]] for batch in self._batches]

    def _decode_cells(self, decoding: Sequence[Sequence[int]]) -> list[_Cell]:
        """The cells of the batches with computed rows, also if all of them have ended."""
        cells = []
        for batch, live in zip(self._batches, decoding, strict=True):
            if some := live or [row for row in batch if self._new[row]]:
                count = len(some) if self._passes.closes_up else len(batch)
                cells.append(_Cell(count, round(sum(self._new[row] for row in some) / len(some)), len(some)))
        return cells

    def _entry(self) -> list[tuple[int, range]]:
        """The batch and the places of each cell that computes prompts."""

        def together(rows: Sequence[int]) -> bool:
            return self._passes.together([self._passes.width] * len(rows))

        return entry_cells(self._batches, self._new, self._passes.rows, together)

    def _following(self) -> list[list[int]]:
        """The row in each place of each batch for the next pass."""
        ended = [new >= most for new, most in zip(self._new, self._answers, strict=True)]
        rows = ended, self._new, self._waiting, self._passes.rows
        if self._passes.closes_up:
            return closed_up(self._batches, self._sizes, *rows)
        return reseated(self._batches, *rows)


def _consecutive(sizes: Sequence[int]) -> list[list[int]]:
    """Batches of these sizes, with the rows 0, 1, ..."""
    return [list(range(*ends)) for ends in pairwise(accumulate(sizes, initial=0))]
