"""Predicts a block in which rows end early and prompts that wait enter: the seconds of its `refilled_passes`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flexgen.layout.cache_pool import cache_pool
from flexgen.layout.passes import Passes
from flexgen.layout.plan import room_sizes
from flexgen.layout.topology import Topology
from flexgen.policy import Policy
from flexgen.predict.job import Job
from flexgen.predict.pass_timer import PassTimer
from flexgen.predict.pass_times import PassTimes
from flexgen.predict.placed import PlacedModel
from flexgen.predict.refilled_passes import RefilledPass, refilled_passes
from flexgen.predict.timeline import Timeline
from flexgen.results.report import ByPhase, PlacesUsed, Stage
from flexgen.results.trace import LaneName, Phase
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

_BLOCKS = 16
"""Only this number of blocks of prompts is simulated. The others are like those between the first and the last."""


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
    workload, topology = job.workload, job.hardware.topology
    places = min(policy.block_size, workload.num_prompts)
    part = replace(workload, num_prompts=min(workload.num_prompts, _BLOCKS * policy.block_size))
    passes = _passes(part, policy, model, topology)
    times = PassTimes(
        PassTimer(job, policy, model, slots), passes, workload.prompt_len, topology.closes_up(policy)
    )
    # The prompts that are not simulated repeat the steady stage.
    repeats = 1 + (workload.num_prompts - part.num_prompts) / max(part.num_prompts - 2 * places, 1)
    counted = [_counted(one, times, repeats if one.stage is Stage.STEADY else 1.0) for one in passes]
    prefill = [one for one in counted if one.own.entering]
    decode = [one for one in counted if not one.own.entering]
    return RefilledBlock(
        sum((one.seconds for one in prefill), 0.0),
        sum((one.seconds for one in decode), 0.0),
        {Phase.PREFILL: _summed_lanes(prefill), Phase.DECODE: _summed_lanes(decode)},
        _stages(counted, places),
        round(sum(part.answers()) * workload.num_prompts / part.num_prompts),
        round(sum(one.weight * one.own.put_back for one in counted)),
        [(one.first_token, one.timeline) for one in times.timed],
    )


def _passes(workload: Workload, policy: Policy, model: PlacedModel, topology: Topology) -> list[RefilledPass]:
    """The passes of a block with all prompts of the workload."""
    sizes = room_sizes(policy, workload.num_prompts, workload.gen_len)
    pool = cache_pool(model.layers, policy, sizes, workload, model.placement.dtype, topology)
    # With guesses, a row needs fewer passes. The growth of its cache from pass to pass is that of one token.
    answers = workload.passes(policy.guess)
    return list(refilled_passes(answers, policy, Passes.of(workload, policy, topology), pool))


class _Counted(NamedTuple):
    """A pass that counts `weight` times, and all seconds of these: those of the pass, and of each lane alone."""

    own: RefilledPass
    weight: float
    seconds: float
    lanes: dict[LaneName, float]


def _counted(one: RefilledPass, times: PassTimes, weight: float) -> _Counted:
    seconds, lanes = times.of(one)
    return _Counted(one, weight, weight * seconds, {lane: weight * alone for lane, alone in lanes.items()})


def _summed_lanes(passes: Iterable[_Counted]) -> dict[LaneName, float]:
    total: dict[LaneName, float] = {}
    for one in passes:
        for lane, alone in one.lanes.items():
            total[lane] = total.get(lane, 0.0) + alone
    return total


def _stages(passes: Sequence[_Counted], places: int) -> dict[Stage, PlacesUsed]:
    """The stages that the block has. places: those of the block."""
    found = {}
    for stage in Stage:
        if some := [one for one in passes if one.own.stage is stage]:
            used = sum(one.own.live for one in some) / (len(some) * places)
            found[stage] = PlacesUsed(sum(one.seconds for one in some), used)
    return found


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
