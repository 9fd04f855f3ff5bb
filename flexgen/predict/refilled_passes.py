"""The passes of a block in which rows end early and prompts that wait enter.

They are those of the runtime, from the same rules (`schedule/admission.py`), for given lengths of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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

    rows: of each cell of a layer. tokens: of each, the new token of the rows that have the most, as in `Passes`. If
    prompts enter in the places of single rows, it is the mean. attending: of each, the number of rows that get a
    token, whose cache attention reads.
    live: the number of rows that get a new token. moved: the cached tokens that were copied before the pass, summed
    over rows. begins: whether a run begins with it, because the batches before it were others. cut: whether its run
    ends with it and before the last pass of its grid, so that loads for the next pass have been issued. put_back:
    the number of rows that are put back to wait after it. A part of such a row that is computed again counts as a
    prompt. loaded: whether the run before has loaded the first weights for it (`runtime/weights_ahead.py`).
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
    def kind(self) -> tuple[int, int, bool, bool]:
        """Passes of one kind differ in the lengths of their rows, and little in the number of rows."""
        return len(self.tokens), self.entering, self.begins, self.loaded

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
        yield from _by_place(answers, policy, passes)
        return
    sizes, longest, lead = batch_sizes(policy, len(answers)), max(answers), -passes.first
    seated, made = sum(sizes), [0] * len(answers)  # made: the new tokens of rows that were put back
    batches = [list(range(*ends)) for ends in pairwise(accumulate(sizes, initial=0))]
    waiting = [list(range(n, min(n + sizes[0], len(answers)))) for n in range(seated, len(answers), sizes[0])]
    began = dict.fromkeys(range(seated), lead)
    ended = [False] * len(answers)
    number, stage, begins, loaded, moved, entered = 0, Stage.FILL, True, False, 0, False
    while batches:
        first = [min(began[row] for row in batch) for batch in batches]
        origins = [min(began[row] - made[row] for row in batch) for batch in batches]
        running = [row for batch in batches for row in batch if not ended[row] and began[row] <= number]
        for row in running:
            ended[row] = made[row] + number - began[row] + 1 >= answers[row]
        number += 1
        entering = [k for k, begin in enumerate(first) if begin >= number]
        live = [row for batch in batches for row in batch if not ended[row]]
        left = max((longest - number + began[row] - made[row] for row in live), default=0)
        # As in `NewTokens.following`: whether a row has all of its tokens.
        last = longest - number + min(origins) < 1
        kept: list[list[int]] | None
        if last and not policy.guess:
            kept = gathered(batches, ended, entering)
        else:
            kept = regrouped(batches, ended, left, entering, bool(waiting))
        following, put_back = batches if kept is None else kept, list[list[int]]()
        if pool is not None:
            lengths = [passes.width + count for count in made]
            seats = Seats(len(sizes), number - 1, lengths, began, pool.fits)
            following, put_back = seats.following(following, waiting)
        elif kept is not None:
            following = [*kept, *waiting[: len(sizes) - len(kept)]]
        changed = following != batches
        tokens = tuple(
            number - 1 - origin if begin < number - 1 else max(number - 1 - begin, passes.first)
            for begin, origin in zip(first, origins, strict=True)
        )
        put_back = [[row for row in batch if not ended[row]] for batch in put_back]
        cut = changed and not last
        yield RefilledPass(
            tuple(map(len, batches)),
            tokens,
            tuple(map(len, batches)),
            len(running),
            stage,
            moved=moved,
            begins=begins,
            cut=cut,
            put_back=sum(map(len, put_back)),
            loaded=loaded,
        )
        for rows in put_back:
            for row in rows:
                made[row] += max(number - began.pop(row), 0)
            waiting.insert(0, sorted(rows, key=made.__getitem__))
        # If only prompts that waited are left, they begin with passes of their own numbers (`Prompts.restart`).
        here = {row for batch in batches for row in batch}
        loaded = cut and any(row in here for batch in following for row in batch)
        moved, begins = 0, changed
        if not changed:
            continue
        before = {frozenset(batch) for batch in batches}
        for batch in following:
            if batch[0] not in began:
                waiting.remove(batch)
                ahead = -passes.first_of(passes.width + max(made[row] for row in batch))
                began.update(dict.fromkeys(batch, number + ahead))
                entered = True
            elif frozenset(batch) not in before:
                moved += sum(passes.width + made[row] + number - began[row] for row in batch)
        if entered:
            stage = Stage.STEADY if waiting else Stage.DRAIN
        batches = following


def _by_place(answers: Sequence[int], policy: Policy, passes: Passes) -> Iterator[RefilledPass]:
    """The passes of a block in which prompts enter in the places of single rows."""
    sizes = batch_sizes(policy, len(answers))
    batches = [list(range(*ends)) for ends in pairwise(accumulate(sizes, initial=0))]
    waiting, seats = list(range(sum(sizes), len(answers))), sum(sizes)
    new, stage, begins, loaded, copied = [0] * len(answers), Stage.FILL, True, False, 0
    while any(batches):
        computed = [count > 0 for count in new]
        entry = entry_cells(
            batches, computed, passes.rows, lambda rows: passes.together([passes.width] * len(rows))
        )
        live = [[row for row in batch if computed[row] and new[row] < answers[row]] for batch in batches]
        decode = []
        for batch, some in zip(batches, live, strict=True):
            if some := some or [row for row in batch if computed[row]]:
                count = len(some) if passes.closes_up else len(batch)
                decode.append((count, round(sum(new[row] for row in some) / len(some)), len(some)))
        entering = [(len(places), 0, len(places)) for _, places in entry]
        rows, tokens, attending = zip(*between(decode, entering), strict=True)
        left = max(answers) - min(new[row] for batch in batches for row in batch)
        running = [row for some in live for row in some]
        running += [row for k, places in entry for row in batches[k][places.start : places.stop]]
        for row in running:
            new[row] += 1
        ended = [count >= most for count, most in zip(new, answers, strict=True)]
        rest = ended, new, waiting, passes.rows
        seated = closed_up(batches, sizes, *rest) if passes.closes_up else reseated(batches, *rest)
        changed = bool(entry) or seated != batches
        cut = changed and left > 1
        yield RefilledPass(
            rows, tokens, attending, len(running), stage, copied, begins=begins, cut=cut, loaded=loaded
        )
        copied = sum(passes.width + new[row] for row in movers(batches, seated, new))
        batches, begins, loaded = seated, changed, cut
        seats = max(seats, *(1 + row for batch in batches for row in batch), 0)
        waiting = list(range(seats, len(answers)))
        if seats > sum(sizes):
            stage = Stage.STEADY if waiting else Stage.DRAIN
