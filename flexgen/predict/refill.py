"""Predicts a block in which rows end early and prompts that wait enter: its passes, and their seconds.

The passes are those of the runtime, from the same rule (`schedule/admission.py`), for the lengths of
`Workload.answers`. A few passes of each kind are timed, and the seconds of the others are interpolated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from flexgen.layout.cache_pool import CachePool, cache_pool
from flexgen.layout.passes import Passes
from flexgen.layout.plan import batch_sizes, room_sizes
from flexgen.policy import Policy
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.job import Job
from flexgen.predict.numbering import Numbered, numbered
from flexgen.predict.placed import PlacedModel
from flexgen.predict.timeline import Costs, Timeline, play_with_losses, works_of
from flexgen.results.report import ByPhase, PlacesUsed, Stage
from flexgen.results.trace import LaneName, Phase
from flexgen.schedule.admission import between, entry_cells, gathered, regrouped, reseated
from flexgen.schedule.orders import Slots
from flexgen.schedule.seats import Seats
from flexgen.schedule.steps import Op, Step
from flexgen.workload import Workload

_BLOCKS = 16
"""Only this number of blocks of prompts is simulated. The others are like those between the first and the last."""
_COPIES = 2
"""A row that moves is copied to temporary memory and back."""


def refills(workload: Workload, policy: Policy) -> bool:
    """Whether rows end or are put back in different passes, so that prompts enter while other rows decode."""
    ends_apart = workload.mean_new is not None or workload.tokens_in_pass(policy.guess) > 1
    return ends_apart or policy.reserves(workload.gen_len) or Passes.of(workload, policy).rows > 0


@dataclass(frozen=True)
class RefilledPass:
    """One pass of a block.

    rows: of each cell of a layer. tokens: of each, the new token of the rows that have the most, as in `Passes`. If
    prompts enter in the places of single rows, it is the mean.
    live: the number of rows that get a new token. moved: the cached tokens that were copied before the pass, summed
    over rows. begins: whether a run begins with it, because the batches before it were others. cut: whether its run
    ends with it and before the last pass of its grid, so that loads for the next pass have been issued. put_back:
    the number of rows that are put back to wait after it. A part of such a row that is computed again counts as a
    prompt. loaded: whether the run before has loaded the first weights for it (`runtime/weights_ahead.py`).
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
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

    @property
    def mean_token(self) -> float:
        return sum(self.tokens) / len(self.tokens)


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
    new, stage, begins, loaded = [0] * len(answers), Stage.FILL, True, False
    while any(batches):
        computed = [count > 0 for count in new]
        entry = entry_cells(batches, computed, passes.rows, passes.rows_of_cell)
        live = [[row for row in batch if computed[row] and new[row] < answers[row]] for batch in batches]
        decode = []
        for batch, some in zip(batches, live, strict=True):
            if some := some or [row for row in batch if computed[row]]:
                decode.append((len(batch), round(sum(new[row] for row in some) / len(some))))
        rows, tokens = zip(*between(decode, [(len(places), 0) for _, places in entry]), strict=True)
        left = max(answers) - min(new[row] for batch in batches for row in batch)
        running = [row for some in live for row in some]
        running += [row for k, places in entry for row in batches[k][places.start : places.stop]]
        for row in running:
            new[row] += 1
        ended = [count >= most for count, most in zip(new, answers, strict=True)]
        seated = reseated(batches, ended, [count > 0 for count in new], waiting, passes.rows)
        changed = bool(entry) or seated != batches
        cut = changed and left > 1
        yield RefilledPass(rows, tokens, len(running), stage, begins=begins, cut=cut, loaded=loaded)
        batches, begins, loaded = seated, changed, cut
        seats = max(seats, *(1 + row for batch in batches for row in batch), 0)
        waiting = list(range(seats, len(answers)))
        if seats > sum(sizes):
            stage = Stage.STEADY if waiting else Stage.DRAIN


@dataclass(frozen=True)
class RefilledBlock:
    """Seconds of the passes in which prompts enter and of the others, seconds of each lane alone by phase, the stages
    of the block, the new tokens, the number of rows that were put back, and the timelines of the passes that were
    timed, with their tokens."""

    prefill: float
    decode: float
    phases: ByPhase
    stages: dict[Stage, PlacesUsed]
    new_tokens: int
    put_back: int
    timed: Sequence[tuple[int, Timeline]] = field(repr=False)


def refilled_block(job: Job, policy: Policy, model: PlacedModel, slots: Slots) -> RefilledBlock:
    """The prediction of a workload whose rows end or are put back in different passes. A cache on disk is not charged
    for the pages that it writes.

    slots: those of a full block.
    """
    workload, places = job.workload, min(policy.block_size, job.workload.num_prompts)
    simulated = min(workload.num_prompts, _BLOCKS * policy.block_size)
    part = replace(workload, num_prompts=simulated)
    # With guesses, a row needs fewer passes. The growth of its cache from pass to pass is that of one token.
    shape = room_sizes(policy, part.num_prompts, part.gen_len), part
    pool = cache_pool(model.layers, policy, *shape, model.placement.dtype, job.hardware.topology)
    passes = list(refilled_passes(part.passes(policy.guess), policy, Passes.of(workload, policy), pool))
    times = _PassTimes(job, policy, model, slots, passes)
    # The prompts that are not simulated repeat the steady stage.
    repeats = 1 + (workload.num_prompts - simulated) / max(simulated - 2 * places, 1)
    seconds = dict.fromkeys(Phase, 0.0)
    phases: dict[Phase, dict[LaneName, float]] = {phase: {} for phase in Phase}
    spent, live, count = (dict.fromkeys(Stage, 0.0) for _ in range(3))
    put_back = 0.0
    for one in passes:
        weight = repeats if one.stage is Stage.STEADY else 1.0
        phase = Phase.PREFILL if one.entering else Phase.DECODE
        took, lanes = times.of(one)
        seconds[phase] += weight * took
        put_back += weight * one.put_back
        spent[one.stage] += weight * took
        live[one.stage] += one.live
        count[one.stage] += places
        for lane, alone in lanes.items():
            phases[phase][lane] = phases[phase].get(lane, 0.0) + weight * alone
    stages = {stage: PlacesUsed(spent[stage], live[stage] / count[stage]) for stage in Stage if count[stage]}
    new_tokens = round(sum(part.answers()) * workload.num_prompts / simulated)
    return RefilledBlock(
        seconds[Phase.PREFILL],
        seconds[Phase.DECODE],
        phases,
        stages,
        new_tokens,
        round(put_back),
        times.timed,
    )


def all_stages(blocks: Sequence[RefilledBlock]) -> dict[Stage, PlacesUsed]:
    """The stages of blocks that run one after another; none if no prompt enters where rows have ended."""
    seconds: dict[Stage, float] = defaultdict(float)
    in_use: dict[Stage, float] = defaultdict(float)
    for block in blocks:
        for stage, found in block.stages.items():
            seconds[stage] += found.seconds
            in_use[stage] += found.seconds * found.used
    if len(seconds) < 2:
        return {}
    return {stage: PlacesUsed(took, in_use[stage] / took) for stage, took in seconds.items()}


_Kind = tuple[int, int, bool, bool]


class _PassTimes:
    """The seconds of passes. Of each kind, those with the shortest and the longest rows are timed."""

    def __init__(
        self, job: Job, policy: Policy, model: PlacedModel, slots: Slots, passes: Sequence[RefilledPass]
    ) -> None:
        self._job = job
        self._policy = policy
        self._model = model
        self._slots = slots
        self.timed: list[tuple[int, Timeline]] = []
        self._known: dict[_Kind, list[tuple[float, float, float, dict[LaneName, float]]]] = {}
        kinds: dict[_Kind, list[RefilledPass]] = {}
        for one in passes:
            kinds.setdefault(one.kind, []).append(one)
        for kind, some in kinds.items():
            ends = min(some, key=lambda one: one.mean_token), max(some, key=lambda one: one.mean_token)
            self._known[kind] = [(one.mean_token, *self._timed(one)) for one in dict.fromkeys(ends)]

    def of(self, one: RefilledPass) -> tuple[float, dict[LaneName, float]]:
        """The seconds of a pass, and those of each lane alone."""
        known = self._known[one.kind]
        at = [token for token, *_ in known]

        def between(values: Sequence[float]) -> float:
            return float(np.interp(one.mean_token, at, values))

        seconds = between([took for _, took, _, _ in known])
        if one.cut:
            seconds += between([rest for _, _, rest, _ in known])
        lanes = {lane: between([busy.get(lane, 0.0) for *_, busy in known]) for lane in known[-1][3]}
        return seconds + one.moved * self._token_copy, lanes

    def _timed(self, one: RefilledPass) -> tuple[float, float, dict[LaneName, float]]:
        """The seconds of a pass, those until the steps that are issued ahead are done, and those of each lane."""
        job, batches, layers = self._job, len(one.rows), len(self._model.layers)
        # A pass that begins a run comes first; others have one before them. One after them has its weights loaded.
        ahead = range(2) if one.begins else range(-1, 2)
        begin = Passes.of(job.workload, self._policy).first  # before a row's last part, there is another one
        tokens = [tuple(max(token + n, begin) for token in one.tokens) for n in ahead]
        order = job.order_for(self._policy, batches)
        block = CostedBlock(sum(one.rows), order, tokens, batches=one.rows)
        costs = StepCosts(self._model, self._policy, job.workload, block)
        grid = order.grid(len(tokens), layers, batches, costs.weight_pieces, self._slots, costs.feeds_ids)
        steps = numbered(order, grid)
        works = works_of(steps, costs, costs.alike)
        played = _with_loaded(steps, works) if one.loaded else works
        hardware, prefill = job.hardware, _in_prefill(steps, tokens)
        inline, startup = hardware.computes_inline, hardware.startup(order.serial)
        timeline = play_with_losses(steps, played, hardware.losses, prefill, inline, startup)
        self.timed.append((one.tokens[0], timeline))
        known = [0.0, *timeline.last_ends(Op.STORE_HIDDEN, layers - 1)]
        n = ahead.index(0)
        issued = sum(len(section.entries) for section in steps.sections[: (n + 1) * layers])
        rest = max(timeline.done[:issued]) - known[n + 1]
        lanes: dict[LaneName, float] = {}
        for visit, work in zip(steps.visits(), works, strict=True):
            if visit // layers == n:
                for chain in work:
                    for lane, seconds in chain:
                        lanes[lane] = lanes.get(lane, 0.0) + seconds
        return known[n + 1] - known[n], max(rest, 0.0), lanes

    @cached_property
    def _token_copy(self) -> float:
        """Seconds that move the cache of one token of one row, in all layers."""
        rate = self._job.hardware.bandwidth.get(LaneName.HOST)
        if rate is None:
            return 0.0
        workload = Workload(1, 1, 1)
        block = CostedBlock(1, self._job.order_for(self._policy, 1), batches=[1])
        costs = StepCosts(self._model, self._policy, workload, block)
        return _COPIES * costs.cached_token_bytes / rate


def _in_prefill(steps: Numbered, tokens: Sequence[Sequence[int]]) -> list[bool]:
    """For each entry, whether it computes prompts, or is a part of a pass in which no row decodes.

    tokens: of each pass, the token of each cell. Weights that arrive while rows decode share host memory with the
    attention of these rows, as in a decode.
    """
    alone = [max(some) <= 0 for some in tokens]

    def prompts(step: Step) -> bool:
        return alone[step.token] or (step.op is not Op.LOAD_WEIGHTS and tokens[step.token][step.batch] <= 0)

    return [step is not None and prompts(step) for step in steps.steps()]


def _with_loaded(steps: Numbered, works: Sequence[Costs]) -> list[Costs]:
    """The works without the loads for the first pass that the run before has issued: those of weights that are issued
    one pass later, in this run, before the second pass begins."""
    # By entry: the visit during which it is issued, its own visit and its piece.
    loads = [
        (visit, visit + ahead, piece) if op is Op.LOAD_WEIGHTS else None
        for visit, section in enumerate(steps.sections)
        for op, ahead, piece in section.entries
    ]
    layers = steps.layers
    loaded = {(load[1] - layers, load[2]) for load in loads if load and load[0] < layers <= load[1]}
    return [() if load and load[1:] in loaded else work for load, work in zip(loads, works, strict=True)]
