"""Predicts a run on a machine from its figures, with the plan, the schedule and the report of a real run."""

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
from flexgen.layout.prefix import grouped, prefix_policy, prefix_slots, prefix_workloads, shared_tokens
from flexgen.models import Layer, ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.fixed import Fixed
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.predict.numbering import numbered
from flexgen.predict.placed import PlacedModel, Placements
from flexgen.predict.refill import RefilledBlock, all_stages, refilled_block, refills
from flexgen.predict.timeline import Timeline, play_with_losses, works_of
from flexgen.predict.workspaces import workspaces_on
from flexgen.results.bounds import timed_lanes
from flexgen.results.placement import placement_table
from flexgen.results.report import ByPhase, Report
from flexgen.results.trace import LaneName, Phase, Trace
from flexgen.schedule.orders import Order, Slots
from flexgen.schedule.steps import Op
from flexgen.units import format_bytes
from flexgen.workload import Workload

_EXACT_CELLS = 100_000
"""Blocks with more cells than this are predicted from some of their tokens, unless the caller asks for all."""
_SAMPLES = 8


@dataclass(frozen=True)
class _Block:
    """One block: seconds by phase, seconds of each lane alone, and the timeline of the simulated `tokens`."""

    prefill: float
    decode: float
    phases: ByPhase
    tokens: Sequence[int]
    timeline: Timeline


@dataclass(frozen=True)
class Prediction:
    """The prediction of a run.

    report: the report, in the form of a run's report.
    plan: the memory plan of the run.
    layer_names: the names of the layers, indexed by `Step.layer` of the trace.
    """

    report: Report
    plan: MemoryPlan
    layer_names: tuple[str, ...]
    _blocks: tuple[_Block, ...] = field(repr=False)

    def trace(self) -> Trace:
        """The events of the call, block after block. A sampled prediction has those of the sampled tokens only, and
        one in which rows end early those of the first two passes."""
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
    """Predict the time and the memory of `OptLM.generate` on `hardware`, without a run.

    spec: the model.
    policy: the policy of the run.
    hardware: the figures of the machine.
    workload: the prompts and lengths; all prompts have the full length.
    dtype: the name of a dtype, or "auto", which is the checkpoint's dtype if the machine has products for it.
    order: the name of the order; None is the policy's own.

    Raises RequestError (invalid lengths or dtype), ScheduleError (an unknown order), HardwareError (a missing figure)
    and CapacityError (the plan does not fit), with the messages of a run.
    """
    return predict_job(Job.checked(spec, hardware, workload, dtype, order), policy)


def predict_job(
    job: Job, policy: Policy, samples: int | None = None, placements: Placements | None = None
) -> Prediction:
    """`predict` for a job that was checked.

    samples: None simulates all tokens of a block of up to 100,000 cells, which is exact, and 8 samples of a larger
        one. A number simulates the prefill, three tokens of the decode (six with a cache on disk) and that number of
        other tokens. Seconds grow linearly with the context, so those of the tokens between are interpolated. Tests
        check that the result is within 5% of the exact one.
    placements: the placements of the job's model, if the caller has them.
    """
    workload = job.workload
    placements = placements or Placements(job.spec, job.dtype)
    layers = placements.layers(policy.sep_layer)
    placement = placements.placement(policy.sep_layer, policy.weights)
    policy, plan = _plan(job, policy, layers, placement)
    job = replace(job, hardware=job.hardware.copying(_copied(plan, job, policy), policy.pin_weight))
    model = PlacedModel(layers, placement, job.hardware)
    slots = job.order_for(policy).slots
    blocks, refilled = _groups(job, policy, model, slots, samples)
    batches, shared = batch_sizes(policy, workload.num_prompts), shared_tokens(workload, policy)
    groups = grouped(workload, policy).groups
    common = prefix_workloads(workload, policy)[-1].prefix if groups > 1 else shared
    laid_out = sum(token >= 0 for token in blocks[-1].tokens)
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
        prefix=common,
        prefix_groups=groups,
        reused_tokens=shared * (workload.num_prompts - 1) - (shared - common) * (groups - 1),
        phases=_summed([block.phases for block in blocks]),
        plan_bytes=plan.by_tier,
        peak_bytes={},
        placement=placement_table(policy, placement.percent, batches),
        projected_from=laid_out if not refilled and laid_out < workload.gen_len else None,
        new_tokens=sum(one.new_tokens for one in refilled) if workload.mean_new is not None else None,
        put_back=sum(one.put_back for one in refilled),
        stages=all_stages(refilled),
    )
    return Prediction(report, plan, tuple(layer.name for layer in layers), tuple(blocks))


def roofline(
    spec: ModelSpec,
    policy: Policy,
    hardware: Hardware,
    workload: Workload,
    *,
    dtype: str = "auto",
    order: str | None = None,
) -> ByPhase:
    """Seconds of each lane for the bytes and flops alone of each phase, at the rates of `hardware`.

    Fixed costs, such as launches, and element-wise work are not counted, unless the rates of `hardware` include them.
    Raises as `predict` does.
    """
    rates = hardware.replace(fixed=Fixed(), elementwise={}, around_attention={})
    return predict(spec, policy, rates, workload, dtype=dtype, order=order).report.phases


def _plan(
    job: Job, policy: Policy, layers: Sequence[Layer], placement: Placement
) -> tuple[Policy, MemoryPlan]:
    """The policy, with a `prefill_chunk` if whole prompts do not fit, and its plan."""
    hardware = job.hardware
    target = Target(hardware.topology, job.order_for(policy).slots, workspaces_on(hardware))
    limits: dict[Tier, int | None] = {tier: hardware.capacity.get(tier) for tier in Tier}
    # A plan does not count weights on disk, because a run finds them there. They reduce the free space of the disk.
    on_disk, disk = placement.nbytes[Tier.DISK], hardware.capacity[Tier.DISK]
    if on_disk > disk:
        raise CapacityError(
            f"weights on the disk tier take {format_bytes(on_disk)}, but {hardware.name} has {format_bytes(disk)}: "
            "put a smaller share of the weights on disk"
        )
    limits[Tier.DISK] = disk - on_disk

    def plan(asked: Policy) -> MemoryPlan:
        return plan_memory(layers, placement, asked, target, job.workload)

    policy = with_fitting_chunk(plan, policy, limits, job.workload.prompt_len)
    return policy, fitting_plan(plan, policy, limits)


def _copied(plan: MemoryPlan, job: Job, policy: Policy) -> int:
    """Bytes of host memory that the link copies from and to.

    Cache over which the host computes attention counts only if prompts are computed in chunks. Memory that is taken
    page by page is not pinned, and a device copies from it only for the few rows that are computed again.
    """
    stays: tuple[str, ...] = ()
    if job.hardware.topology.host_attends(policy):
        if policy.reserves(job.workload.gen_len):
            stays = ("home",)
        elif not Passes.of(job.workload, policy).extends:
            stays = ("home", "slots")
    return sum(
        need.nbytes
        for need in plan.needs
        if need.tier is Tier.CPU
        and need.role != "workspace"
        and not (need.what == "cache" and need.role in stays)
    )


def _groups(
    job: Job, policy: Policy, model: PlacedModel, slots: Slots, samples: int | None
) -> tuple[list[_Block], list[RefilledBlock]]:
    """The blocks of all groups, with those that compute their prefixes, and the ones of them whose rows end early."""
    workload = job.workload
    sizes = grouped(workload, policy).group_sizes
    blocks: dict[int, list[_Block]] = {}  # by the size of the group
    refilled: dict[int, RefilledBlock] = {}
    for size in dict.fromkeys(sizes):
        if refills(workload, policy):
            one = replace(job, workload=replace(workload, num_prompts=size, groups=1))
            refilled[size] = refilled_block(one, policy, model, slots)
            blocks[size] = [_refilled(refilled[size])]
        else:
            full, rest = divmod(size, policy.block_size)
            shapes = [policy.block_size] * full + ([rest] if rest else [])
            made = {prompts: _block(job, policy, model, prompts, slots, samples) for prompts in set(shapes)}
            blocks[size] = [made[prompts] for prompts in shapes]
    prefix = [
        _block(replace(job, workload=part), prefix_policy(policy), model, 1, prefix_slots(slots), None)
        for part in prefix_workloads(workload, policy)
    ]
    # The next groups use the first parts of the prefix again.
    all_blocks = [*prefix, *blocks[sizes[0]]]
    for size in sizes[1:]:
        all_blocks += [*prefix[-1:], *blocks[size]]
    return all_blocks, [refilled[size] for size in sizes if refilled]


def _refilled(refilled: RefilledBlock) -> _Block:
    """The block, with the timeline of its first two passes."""
    first, timeline = refilled.timed[0]
    return _Block(refilled.prefill, refilled.decode, refilled.phases, range(first, first + 2), timeline)


def _block(
    job: Job, policy: Policy, model: PlacedModel, prompts: int, slots: Slots, samples: int | None
) -> _Block:
    """slots: those of a full block, which may run in another order."""
    hardware, workload, layers = job.hardware, job.workload, model.layers
    batches = len(batch_sizes(policy, prompts))
    parts = range(Passes.of(workload, policy).first, 0)  # passes that generate no token
    lead = len(parts)
    if samples is None and (workload.gen_len + lead) * len(layers) * batches > _EXACT_CELLS:
        samples = _SAMPLES
    new, flushing = sampled_tokens(workload.gen_len, samples, bool(policy.cache.percent(Tier.DISK)))
    tokens = [*parts, *new]
    asked = job.order_for(policy, batches)

    def costs_in(order: Order) -> StepCosts:
        block = CostedBlock(prompts, order, tokens, [lead + n for n in flushing])
        return StepCosts(model, policy, workload, block)

    costs = costs_in(asked)
    shape = len(tokens), len(layers), batches, costs.weight_pieces
    grid = asked.grid(*shape, slots, costs.feeds_ids)
    steps = numbered(asked, grid)
    works, inline = works_of(steps, costs, costs.alike), hardware.computes_inline
    startup = hardware.startup(asked.serial)
    timeline = play_with_losses(steps, works, hardware.losses, lead + 1, inline, startup)
    ends = timeline.last_ends(Op.STORE_HIDDEN, len(layers) - 1)[
        lead:
    ]  # the times at which each token is known for all rows
    trailing = timeline.span - ends[-1]

    def decode(seconds: Sequence[float]) -> float:
        every = decode_seconds(seconds, new, flushing, workload.gen_len, costs.flushes)
        return every / workload.tokens_in_pass(policy.guess)

    took = [end - before for before, end in pairwise([0.0, *ends])]
    # As in a run's lane times, attention on the host is separate from computation on the device.
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
    """The tokens to simulate, and the indices of those that write a page of the cache, if there are `pages` on disk.

    The first token of the decode represents only itself, because it waits for the rest of the prefill, and so does
    the last one, which loads nothing for a next token. A middle token writes a page, and the token after it waits.
    """
    if samples is not None and samples < 1:
        raise RequestError(
            f"samples is {samples}, but it must be at least 1; use None to simulate all tokens"
        )
    if samples is None or samples + 4 + 3 * pages >= gen_len:
        return range(gen_len), ()
    evenly = [round(token) for token in np.linspace(2, gen_len - 2, samples + 1)]
    middle = gen_len // 2
    tokens = sorted({0, 1, *evenly, *(range(middle, middle + 3) if pages else ()), gen_len - 1})
    return tokens, [tokens.index(middle + 1)] if pages else []


def decode_seconds(
    seconds: Sequence[float], tokens: Sequence[int], flushing: Sequence[int], gen_len: int, flushes: int
) -> float:
    """Seconds of all tokens but the first, from the `seconds` of `tokens`.

    They are linear between these tokens. Each of `flushes` pages adds time to the token that writes it and the next.
    """
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
