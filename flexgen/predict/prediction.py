"""What a run would take on a machine that one need not have: the same plan, schedule and report as a run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from flexgen.errors import CapacityError, RequestError
from flexgen.layout.fitting import fitting_plan, with_fitting_chunk
from flexgen.layout.needs import MemoryPlan
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.plan import Target, batch_sizes, plan_memory
from flexgen.models import Layer, ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.hardware import Fixed, Hardware
from flexgen.predict.job import Job
from flexgen.predict.numbering import numbered
from flexgen.predict.placed import PlacedModel, Placements
from flexgen.predict.timeline import Timeline, play_with_losses, works_of
from flexgen.predict.workspaces import workspaces_on
from flexgen.results.report import ByPhase, Report, placement_table, timed_lanes
from flexgen.results.trace import LaneName, Phase, Trace
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Op
from flexgen.units import format_bytes
from flexgen.workload import Workload

_EXACT_CELLS = 100_000
"""A block of more cells than these is predicted from some of its tokens, unless the caller wants all."""
_SAMPLES = 8


@dataclass(frozen=True)
class _Block:
    """One block: seconds, seconds of each lane alone, and when the `tokens` that were laid out are done, numbered
    as they were."""

    prefill: float
    decode: float
    phases: ByPhase
    tokens: Sequence[int]
    timeline: Timeline


@dataclass(frozen=True)
class Prediction:
    """A report as of a run, the memory plan behind it, and the trace."""

    report: Report
    plan: MemoryPlan
    layer_names: tuple[str, ...]
    _blocks: tuple[_Block, ...] = field(repr=False)

    def trace(self) -> Trace:
        """Every event of the call, block after block; of a sampled prediction, those of the sampled tokens."""
        trace, begin = Trace(), 0.0
        for block in self._blocks:
            named = ((e, e.step._replace(token=block.tokens[e.step.token])) for e in block.timeline.events)
            trace.extend((event._replace(step=step) for event, step in named), begin)
            begin += block.prefill + block.decode
        return trace


def predict(
    spec: ModelSpec,
    policy: Policy,
    hardware: Hardware,
    workload: Workload,
    *,
    dtype: str = "auto",
    order: str | None = None,
) -> Prediction:
    """What `OptLM.generate` would take on `hardware` for a workload whose prompts are all of full length.

    dtype: "auto" is the checkpoint's own where the machine has products for it.

    Raises RequestError, ScheduleError (an unknown order), HardwareError (a figure that is missing) and CapacityError,
    with the same words as a run.
    """
    return predict_job(Job.checked(spec, hardware, workload, dtype, order), policy)


def predict_job(
    job: Job, policy: Policy, samples: int | None = None, placements: Placements | None = None
) -> Prediction:
    """`predict` for a job that was checked.

    samples: None lays out every token of a block of up to 100,000 cells, which is exact, and 8 of a larger one. A
        number lays out the prefill, three tokens of the decode (six with a cache on disk) and that many of the
        others. Between them seconds grow evenly with the context, so they are interpolated; the tests hold the
        result within 5% of the exact one.
    placements: those of the job's model that are known already.
    """
    workload = job.workload
    placements = placements or Placements(job.spec, job.dtype)
    layers = placements.layers(policy.sep_layer)
    placement = placements.placement(policy.sep_layer, policy.weights)
    policy, plan = _plan(job, policy, layers, placement)
    job = replace(job, hardware=job.hardware.copying(_copied(plan, job, policy), policy.pin_weight))
    full, rest = divmod(workload.num_prompts, policy.block_size)
    shapes = [policy.block_size] * full + ([rest] if rest else [])
    model = PlacedModel(layers, placement, job.hardware)
    made = {prompts: _block(job, policy, model, prompts, samples) for prompts in set(shapes)}
    blocks = tuple(made[prompts] for prompts in shapes)
    batches = batch_sizes(policy, workload.num_prompts)
    laid_out = sum(token >= 0 for token in blocks[0].tokens)
    report = Report(
        model=job.spec.name,
        policy=policy,
        device=job.hardware.name,
        dtype=job.dtype_name,
        order=job.order_for(policy, len(batches)).name,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        num_prompts=workload.num_prompts,
        prefill_s=sum(block.prefill for block in blocks),
        decode_s=sum(block.decode for block in blocks),
        prompt_tokens=workload.num_prompts * workload.prompt_len,
        phases=_summed([block.phases for block in blocks]),
        plan_bytes=plan.by_tier,
        peak_bytes={},
        placement=placement_table(policy, placement.percent, batches),
        projected_from=laid_out if laid_out < workload.gen_len else None,
    )
    return Prediction(report, plan, tuple(layer.name for layer in layers), blocks)


def roofline(
    spec: ModelSpec,
    policy: Policy,
    hardware: Hardware,
    workload: Workload,
    *,
    dtype: str = "auto",
    order: str | None = None,
) -> ByPhase:
    """Seconds of each lane for the bytes and flops of each phase alone, at the rates of `hardware`.

    Launches, other fixed costs and element-wise work count for nothing, as far as `hardware` has figures for them:
    without those its rates contain the element-wise work. Raises as `predict` does.
    """
    rates = hardware.replace(fixed=Fixed(), elementwise={}, around_attention={})
    return predict(spec, policy, rates, workload, dtype=dtype, order=order).report.phases


def _plan(
    job: Job, policy: Policy, layers: Sequence[Layer], placement: Placement
) -> tuple[Policy, MemoryPlan]:
    """The policy, in parts of prompts where whole ones do not fit, and its plan."""
    hardware = job.hardware
    target = Target(hardware.topology, job.order_for(policy).slots, workspaces_on(hardware))
    limits: dict[Tier, int | None] = {tier: hardware.capacity.get(tier) for tier in Tier}
    # A plan does not count weights on disk, which a run finds there; what is left of the disk is less by them.
    on_disk, disk = placement.nbytes[Tier.DISK], hardware.capacity[Tier.DISK]
    if on_disk > disk:
        raise CapacityError(
            f"weights on the disk tier take {format_bytes(on_disk)}, and {hardware.name} has {format_bytes(disk)} of "
            "it: put a smaller share of them on disk"
        )
    limits[Tier.DISK] = disk - on_disk

    def plan(asked: Policy) -> MemoryPlan:
        return plan_memory(layers, placement, asked, target, job.workload)

    policy = with_fitting_chunk(plan, policy, limits, job.workload.prompt_len)
    return policy, fitting_plan(plan, policy, limits)


def _copied(plan: MemoryPlan, job: Job, policy: Policy) -> int:
    """Bytes of host memory that the link copies from and to. Cache that the host attends over is among them where
    prompts are computed in parts."""
    in_parts = Passes(job.workload.prompt_len, policy.prefill_chunk).extends
    stays = ("home", "slots") if job.hardware.topology.host_attends(policy) and not in_parts else ()
    return sum(
        need.nbytes
        for need in plan.needs
        if need.tier is Tier.CPU
        and need.role != "workspace"
        and not (need.what == "cache" and need.role in stays)
    )


def _block(job: Job, policy: Policy, model: PlacedModel, prompts: int, samples: int | None) -> _Block:
    hardware, workload, layers = job.hardware, job.workload, model.layers
    batches = len(batch_sizes(policy, prompts))
    parts = range(Passes(workload.prompt_len, policy.prefill_chunk).first, 0)  # passes that give no token
    lead = len(parts)
    if samples is None and (workload.gen_len + lead) * len(layers) * batches > _EXACT_CELLS:
        samples = _SAMPLES
    new, flushing = sampled_tokens(workload.gen_len, samples, bool(policy.cache.percent(Tier.DISK)))
    tokens = [*parts, *new]
    asked, full = job.order_for(policy, batches), job.order_for(policy)

    def costs_in(order: Order) -> StepCosts:
        block = CostedBlock(prompts, order, tokens, [lead + n for n in flushing])
        return StepCosts(model, policy, workload, block)

    costs = costs_in(asked)
    # The buffers are those of a full block, whose batches may run in another order.
    shape = len(tokens), len(layers), batches, costs.weight_pieces
    grid = asked.grid(*shape, full.slots, costs.feeds_ids)
    steps = numbered(asked, grid)
    timeline = play_with_losses(steps, works_of(steps, costs, model.alike), hardware.losses, lead + 1)
    ends = timeline.last_ends(Op.STORE_HIDDEN, len(layers) - 1)[
        lead:
    ]  # when each token was known for all rows
    trailing = timeline.span - ends[-1]

    def decode(seconds: Sequence[float]) -> float:
        return decode_seconds(seconds, new, flushing, workload.gen_len, costs.flushes)

    took = [end - before for before, end in pairwise([0.0, *ends])]
    # As a run times its lanes: what the host attends is apart from what the device computes.
    attends = hardware.topology.host_attends(policy)
    apart = (
        costs if asked.splits_attention or not attends else costs_in(replace(asked, splits_attention=True))
    )
    busy = [apart.busy(n) for n in range(len(tokens))]
    phases: dict[Phase, dict[LaneName, float]] = {phase: {} for phase in Phase}
    for lane in timed_lanes(attends):
        by_pass = [by_lane.get(lane, 0.0) for by_lane in busy]
        prefill = sum(by_pass[: lead + 1])
        for phase, alone in ((Phase.PREFILL, prefill), (Phase.DECODE, decode(by_pass[lead:]))):
            if alone:
                phases[phase][lane] = alone
    return _Block(ends[0], decode(took) + trailing, phases, tokens, timeline)


def sampled_tokens(gen_len: int, samples: int | None, pages: bool) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens to lay out, and which of them (by place) write a page of the cache where there are `pages` on disk.

    The first of the decode stands for itself, because it waits for what the prefill leaves, and so does the last,
    which fetches nothing for a next one. A page is written in the middle, and what comes after waits.
    """
    if samples is not None and samples < 1:
        raise RequestError(f"samples is {samples}; it must be at least 1")
    if samples is None or samples + 4 + 3 * pages >= gen_len:
        return range(gen_len), ()
    evenly = [round(token) for token in np.linspace(2, gen_len - 2, samples + 1)]
    middle = gen_len // 2
    tokens = sorted({0, 1, *evenly, *(range(middle, middle + 3) if pages else ()), gen_len - 1})
    return tokens, [tokens.index(middle + 1)] if pages else []


def decode_seconds(
    seconds: Sequence[float], tokens: Sequence[int], flushing: Sequence[int], gen_len: int, flushes: int
) -> float:
    """Seconds of all tokens but the first, from those of `tokens`: linear in between, and what each of `flushes`
    pages adds to the token that writes it and to the next."""
    of_pages = sum(seconds[n] + seconds[n + 1] - 2 * seconds[n - 1] for n in flushing)
    plain = [n for n in range(1, len(tokens)) if n not in flushing and n - 1 not in flushing]
    if not plain:
        return 0.0
    between = np.interp(range(1, gen_len), [tokens[n] for n in plain], [seconds[n] for n in plain])
    return float(between.sum()) + flushes * of_pages


def _summed(blocks: Sequence[ByPhase]) -> ByPhase:
    total: dict[Phase, dict[LaneName, float]] = {phase: {} for phase in Phase}
    for phases in blocks:
        for phase, lanes in phases.items():
            for lane, seconds in lanes.items():
                total[phase][lane] = total[phase].get(lane, 0.0) + seconds
    return total
