"""Times a pass of a block in which rows end early, in a simulation of the pass with those before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flexgen.layout.passes import Passes
from flexgen.policy import Policy
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.job import Job
from flexgen.predict.numbering import Numbered, numbered
from flexgen.predict.placed import PlacedModel
from flexgen.predict.refilled_passes import RefilledPass
from flexgen.predict.timeline import Costs, Timeline, play_with_losses, works_of
from flexgen.results.trace import LaneName
from flexgen.schedule.orders import Slots
from flexgen.schedule.steps import Op, Step
from flexgen.workload import Workload

_COPIES = 2
"""A row that moves is copied to temporary memory and back."""


@dataclass(frozen=True)
class TimedPass:
    """The time of one pass.

    seconds: from the end of the pass before until its new tokens are known.
    ahead: the seconds after that until the steps are done which have been issued for the next pass by then. A run
        that ends with the pass waits for them.
    lanes: the seconds of each lane alone.
    first_token, timeline: the token of the first cell, and the simulation, also of the passes before and after.
    """

    seconds: float
    ahead: float
    lanes: dict[LaneName, float]
    first_token: int
    timeline: Timeline = field(repr=False)


class PassTimer:
    """Times passes of a block. slots: those of a full block."""

    def __init__(self, job: Job, policy: Policy, model: PlacedModel, slots: Slots) -> None:
        self._job = job
        self._policy = policy
        self._model = model
        self._slots = slots

    def time(self, one: RefilledPass) -> TimedPass:
        """The time of a pass, without that of the rows that move before it."""
        job, hardware = self._job, self._job.hardware
        batches, layers = len(one.rows), len(self._model.layers)
        # A pass that begins a run comes first; others have one before them. One after them has its weights loaded.
        before = 0 if one.begins else 1
        begin = Passes.of(job.workload, self._policy).first  # before a row's last part, there is another one
        tokens = [tuple(max(token + n, begin) for token in one.tokens) for n in range(-before, 2)]
        order = job.order_for(self._policy, batches)
        block = CostedBlock(sum(one.rows), order, tokens, batches=one.rows, attending=one.attending)
        costs = StepCosts(self._model, self._policy, job.workload, block)
        grid = order.grid(len(tokens), layers, batches, costs.weight_pieces, self._slots, costs.feeds_ids)
        steps = numbered(order, grid)
        works = works_of(steps, costs, costs.alike)
        timeline = play_with_losses(
            steps,
            _with_loaded(steps, works) if one.loaded else works,
            hardware.losses,
            _in_prefill(steps, tokens),
            hardware.computes_inline,
            hardware.startup(order.serial),
        )
        ends = [0.0, *timeline.last_ends(Op.STORE_HIDDEN, layers - 1)]
        end = ends[before + 1]
        issued = sum(len(section.entries) for section in steps.sections[: (before + 1) * layers])
        ahead = max(max(timeline.done[:issued]) - end, 0.0)
        lanes = _lanes_alone(steps, works, before)
        return TimedPass(end - ends[before], ahead, lanes, one.tokens[0], timeline)

    @cached_property
    def token_copy(self) -> float:
        """Seconds that move the cache of one token of one row, in all layers."""
        rate = self._job.hardware.bandwidth.get(LaneName.HOST)
        if rate is None:
            return 0.0
        block = CostedBlock(1, self._job.order_for(self._policy, 1), batches=[1])
        costs = StepCosts(self._model, self._policy, Workload(1, 1, 1), block)
        return _COPIES * costs.cached_token_bytes / rate


def _lanes_alone(steps: Numbered, works: Sequence[Costs], number: int) -> dict[LaneName, float]:
    """The seconds of each lane for pass `number` of a schedule."""
    lanes: dict[LaneName, float] = {}
    for visit, work in zip(steps.visits(), works, strict=True):
        if visit // steps.layers == number:
            for chain in work:
                for lane, seconds in chain:
                    lanes[lane] = lanes.get(lane, 0.0) + seconds
    return lanes


def _in_prefill(steps: Numbered, tokens: Sequence[Sequence[int]]) -> list[bool]:
    """For each entry, whether it computes prompts, or is a part of a pass in which no row decodes.

    tokens: of each pass, the token of each cell. Weights that arrive while rows decode share host memory with the
    attention of these rows, as in a decode.
    """
    no_row_decodes = [max(some) <= 0 for some in tokens]

    def in_prefill(step: Step) -> bool:
        return no_row_decodes[step.token] or (
            step.op is not Op.LOAD_WEIGHTS and tokens[step.token][step.batch] <= 0
        )

    return [step is not None and in_prefill(step) for step in steps.steps()]


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
