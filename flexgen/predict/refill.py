"""Predicts a block in which rows end early and prompts that wait enter: the seconds of its `refilled_passes`.

A few passes of each kind are timed, and the seconds of the others are interpolated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from flexgen.layout.cache_pool import cache_pool
from flexgen.layout.passes import Passes
from flexgen.layout.plan import room_sizes
from flexgen.policy import Policy
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.job import Job
from flexgen.predict.numbering import Numbered, numbered
from flexgen.predict.placed import PlacedModel
from flexgen.predict.refilled_passes import RefilledPass, refilled_passes
from flexgen.predict.timeline import Costs, Timeline, play_with_losses, works_of
from flexgen.results.report import ByPhase, PlacesUsed, Stage
from flexgen.results.trace import LaneName, Phase
from flexgen.schedule.orders import Slots
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
    rooms = room_sizes(policy, part.num_prompts, part.gen_len), part
    pool = cache_pool(model.layers, policy, *rooms, model.placement.dtype, job.hardware.topology)
    shape = Passes.of(workload, policy, job.hardware.topology)
    passes = list(refilled_passes(part.passes(policy.guess), policy, shape, pool))
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


_Kind = tuple[int, ...]


class _PassTimes:
    """The seconds of passes. Of each kind, those with the least and the most work (`_work`) are timed."""

    def __init__(
        self, job: Job, policy: Policy, model: PlacedModel, slots: Slots, passes: Sequence[RefilledPass]
    ) -> None:
        self._job = job
        self._policy = policy
        self._model = model
        self._slots = slots
        self.timed: list[tuple[int, Timeline]] = []
        self._known: dict[_Kind, tuple[_Plane, list[tuple[float, float, dict[LaneName, float]]]]] = {}
        kinds: dict[_Kind, list[RefilledPass]] = {}
        for one in passes:
            kinds.setdefault(self._kind(one), []).append(one)
        for kind, some in kinds.items():
            at = np.array([self._work(one) for one in some])
            ends = [some[n] for n in dict.fromkeys([*at.argmin(0).tolist(), *at.argmax(0).tolist()])]
            self._known[kind] = _Plane([self._work(one) for one in ends]), [self._timed(one) for one in ends]

    def _work(self, one: RefilledPass) -> tuple[int, int]:
        """The cached tokens that attention reads, and the prompts that enter. The seconds of passes of one kind are
        nearly linear in both."""
        cells = zip(one.rows, one.tokens, strict=True)
        return one.cached_tokens(self._job.workload.prompt_len), sum(
            rows for rows, token in cells if token <= 0
        )

    def _kind(self, one: RefilledPass) -> _Kind:
        """The kind of a pass. If rows close up, a cell may have any number of rows, so the kind then also has the
        first two binary digits of this number for each cell."""
        sizes = one.rows if self._job.hardware.topology.closes_up(self._policy) else ()
        return *one.kind, *(n >> max(n.bit_length() - 2, 0) << max(n.bit_length() - 2, 0) for n in sizes)

    def of(self, one: RefilledPass) -> tuple[float, dict[LaneName, float]]:
        """The seconds of a pass, and those of each lane alone."""
        plane, known = self._known[self._kind(one)]
        shares = plane.shares(self._work(one))
        seconds = float(shares @ [took + one.cut * rest for took, rest, _ in known])
        lanes = {lane: float(shares @ [busy.get(lane, 0.0) for *_, busy in known]) for lane in known[-1][2]}
        return seconds + one.moved * self._token_copy, lanes

    def _timed(self, one: RefilledPass) -> tuple[float, float, dict[LaneName, float]]:
        """The seconds of a pass, those until the steps that are issued ahead are done, and those of each lane."""
        job, batches, layers = self._job, len(one.rows), len(self._model.layers)
        # A pass that begins a run comes first; others have one before them. One after them has its weights loaded.
        ahead = range(2) if one.begins else range(-1, 2)
        begin = Passes.of(job.workload, self._policy).first  # before a row's last part, there is another one
        tokens = [tuple(max(token + n, begin) for token in one.tokens) for n in ahead]
        order = job.order_for(self._policy, batches)
        block = CostedBlock(sum(one.rows), order, tokens, batches=one.rows, attending=one.attending)
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


class _Plane:
    """Values at n points `at` (n, 2) as a linear function of the point, with the least squares of the errors.

    If the points are nearly on a line, the function does not change across it.
    """

    def __init__(self, at: Sequence[tuple[int, int]]) -> None:
        self._middle, self._scale = np.mean(at, axis=0), np.maximum(np.ptp(at, axis=0), 1)
        # Without rcond, noise in two values whose points nearly coincide would become a steep slope.
        self._inverse = np.linalg.pinv(np.insert((at - self._middle) / self._scale, 0, 1, axis=1), rcond=0.1)

    def shares(self, point: tuple[int, int]) -> np.ndarray:
        """(n,): the weights of the n values, whose weighted sum is the value at `point`."""
        return np.insert((point - self._middle) / self._scale, 0, 1) @ self._inverse


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
