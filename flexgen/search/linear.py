"""Placement as a linear program: the seconds of every lane and the bytes of every tier are, up to rounding, affine
in the shares of a policy.

The figures are those of the cost model and of the memory plan, asked at the corners: policies whose weights, cache
and activations lie on one tier each. No formula of a size or of a time is repeated here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from flexgen.errors import HardwareError, PolicyError
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement, place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.weight_slots import slot_sizes
from flexgen.models import Layer, build_layers
from flexgen.models.spec import LayerSpec
from flexgen.policy import Policy, Share, Tier
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.job import Job
from flexgen.predict.prediction import decode_seconds
from flexgen.predict.workspaces import workspaces_on
from flexgen.results.trace import LaneName
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, all_steps

CLASSES = "weights", "cache", "activations"
LANES = tuple(LaneName)
_LANE_ROW = {lane: row for row, lane in enumerate(LANES)}

_IN_TURN = len(LANES)
"""The row of what a batch has to do one after the other: its hidden states in, its computation, and out again."""
_UNHIDDEN = len(LANES) + 1
"""The row of computation and of weights that it cannot hide, for want of a second slot."""
_ROWS = len(LANES) + 2
_TURN = (Op.LOAD_HIDDEN, Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENDED, Op.COMPUTE, Op.STORE_HIDDEN)

_OTHER_LANES = 0.01
"""What a second of a lane that nothing waits for is held to cost: of placements that are equally fast the one that
moves less is taken, because no order overlaps perfectly."""


class Column(NamedTuple):
    """One way to keep all of a class of data."""

    what: str  # weights, cache, activations
    tier: Tier
    codec: str = "none"


Shares = Mapping[Column, float]
"""What part of its class each column has, 0 to 1."""


def shares_of(policy: Policy) -> Shares:
    """The shares of a policy's classes, by where and in what form they are kept."""
    splits = {"weights": policy.weights, "cache": policy.cache, "activations": policy.activations}
    return {
        Column(what, tier, split[tier].codec): split.percent(tier) / 100
        for what, split in splits.items()
        for tier in Tier
        if split.percent(tier)
    }


@dataclass(frozen=True)
class Figures:
    """Seconds by phase and row (2, rows) and bytes by tier (3,) of a block, affine in the shares.

    `base`: where each class is on its first column. `change`: by column, what it adds if it has all of its class.
    """

    columns: tuple[Column, ...]
    base: np.ndarray
    change: np.ndarray  # (columns, 2 * rows + 3)
    serial: bool  # steps wait for one another, whatever their lane

    def at(self, shares: Shares) -> np.ndarray:
        part = np.array([shares.get(column, 0.0) for column in self.columns])
        return np.asarray(self.base + part @ self.change)

    def seconds(self, shares: Shares) -> list[dict[LaneName, float]]:
        """Of prefill and decode, by lane alone."""
        return [
            dict(zip(LANES, row.tolist(), strict=False)) for row in self.at(shares)[:-3].reshape(2, _ROWS)
        ]

    def of_lane(self, phase: int, lane: LaneName, shares: Shares) -> dict[str, float]:
        """The seconds that each class puts on a lane beyond what it would on the tier where it asks least of it."""
        row = phase * _ROWS + LANES.index(lane)
        asks = dict(zip(self.columns, self.change[:, row], strict=True))
        return {
            what: sum(shares.get(c, 0.0) * asks[c] for c in asks if c.what == what)
            - min(asks[c] for c in asks if c.what == what)
            for what in CLASSES
        }


@dataclass(frozen=True)
class Solution:
    """`seconds` of prefill and decode together, and what a byte more of each tier would save."""

    shares: Shares
    seconds: float
    saved: Mapping[Tier, float]


class Corners:
    """Figures of one job, for any shape of a block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._counts = Counter(job.spec.layers)
        self._layers = cache(self._make_layers)
        self._placement = cache(self._place)
        self._known: dict[tuple[Policy, tuple[Column, ...]], list[tuple[Column, np.ndarray]]] = {}

    def order(self, form: Policy) -> Order:
        """What a policy of this form runs in, wherever its free shares end up."""
        return self._job.order_for(form)

    def figures(self, form: Policy, columns: Sequence[Column]) -> Figures:
        """Of blocks of the form's shape. Columns that the machine or the model has no figures for are left out."""
        several = form.num_gpu_batches > 1
        # What several batches take grows by the same with each.
        first = form.replace(num_gpu_batches=2 if several else 1)
        key = first, tuple(columns)
        if key not in self._known:
            self._known[key] = self._evaluate(first, columns)
        known = self._known[key]
        batches = np.array([1.0, form.num_gpu_batches])
        values = {column: batches @ lines for column, lines in known}
        start = {column.what: column for column in reversed(values)}
        base = values[start["weights"]]
        change = [values[column] - values[start[column.what]] for column in values]
        serial = self.order(form).serial
        return Figures(tuple(values), base, np.array(change), serial)

    def _evaluate(self, form: Policy, columns: Sequence[Column]) -> list[tuple[Column, np.ndarray]]:
        start = {column.what: column for column in reversed(columns)}
        order = self.order(form)
        found, same = [], None
        for column in columns:
            if column == start[column.what] and same is not None:
                found.append((column, same))
                continue
            at = {what: {c.tier: Share(100, c.codec)} for what, c in (start | {column.what: column}).items()}
            try:
                lines = self._corner(form.replace(**at), order)
            except (HardwareError, PolicyError):
                if column == start[column.what]:
                    raise
                continue  # a codec without a figure, or one that cannot keep heads of this size
            if column == start[column.what]:
                same = lines
            found.append((column, lines))
        return found

    def _corner(self, policy: Policy, order: Order) -> np.ndarray:
        """(2, rows * 2 + 3): what does not depend on the number of batches, and what each of them adds."""
        seconds = self._seconds(policy, order)
        nbytes = self._bytes(policy, order)
        return np.concatenate([seconds.reshape(2, -1), nbytes], axis=1)

    def _seconds(self, policy: Policy, order: Order) -> np.ndarray:
        """(2, phases, rows), from a model with one layer of each kind, which counts as often as the whole has it."""
        kinds = tuple(self._counts)
        layers = self._layers(kinds, policy.sep_layer)
        repeated = [self._counts[layer.layer_spec] if layer.layer_spec else 1 for layer in layers]
        gen_len, on_disk = self._job.workload.gen_len, bool(policy.cache.percent(Tier.DISK))
        new, flushing = _few_tokens(gen_len, on_disk)
        parts = range(Passes(self._job.workload.prompt_len, policy.prefill_chunk).first, 0)
        lead, tokens = len(parts), [*parts, *new]
        several = policy.num_gpu_batches > 1
        placement = self._placement(kinds, policy.sep_layer, policy.weights)
        block = CostedBlock(policy.block_size, order, tokens, [lead + n for n in flushing])
        costs = StepCosts(self._job, policy, layers, placement, block)
        sums = [[[0.0] * len(tokens) for _ in range(_ROWS)] for _ in range(2)]
        shape = 1, len(layers), policy.num_gpu_batches, costs.weight_pieces
        for op, _, layer, batch in all_steps(Grid(*shape, splits_attention=order.splits_attention)):
            times = repeated[layer]
            loads_weights = op is Op.LOAD_WEIGHTS
            each = sums[several and batch > 0 and not loads_weights]
            for n in range(len(tokens)):
                longest = 0.0
                for chain in costs(Step(op, n, layer, batch)):
                    for lane, seconds in chain:
                        each[_LANE_ROW[lane]][n] += times * seconds
                    longest = max(longest, sum(seconds for _, seconds in chain))
                if op in _TURN and batch == 0:
                    sums[0][_IN_TURN][n] += times * longest
                if loads_weights and order.slots.weights == 1:
                    sums[0][_UNHIDDEN][n] += times * longest
                if op is Op.COMPUTE:
                    each[_UNHIDDEN][n] += times * longest
        taken = np.array(sums)
        if several:  # from the first and each other to the line through any number of them
            taken[0] -= taken[1]
        decode = [
            [decode_seconds(row[lead:], new, flushing, gen_len, costs.flushes) for row in part]
            for part in taken
        ]
        return np.stack([taken[:, :, : lead + 1].sum(-1), np.array(decode)], axis=1)

    def _bytes(self, policy: Policy, order: Order) -> np.ndarray:
        """(2, tiers), as of `_seconds`: the plan of small models with few batches, and what the other layers add."""
        few, step = self._few_layers(order.slots.weights), order.slots.weights
        least = (self._job.spec.num_layers - 1) % step + 1
        batches = (2, 3) if policy.num_gpu_batches > 1 else (1,)
        planned = cache(lambda layers: np.array([self._planned(policy, order, layers, n) for n in batches]))
        deep = planned(few)
        for kind, count in (self._counts - Counter(few)).items():
            # Of a model of one kind, so many layers more that each slot serves as many of them as before.
            deep = deep + count / step * (planned((kind,) * (least + step)) - planned((kind,) * least))
        each = deep[-1] - deep[0]
        return np.stack([deep[0] - batches[0] * each, each])

    def _few_layers(self, step: int) -> tuple[LayerSpec, ...]:
        """The fewest of the model's first layers that take weight slots of the same sizes as all of them, where
        `step` slots are taken by turns."""
        layers = self._job.spec.layers
        turns = {(kind, n % step) for n, kind in enumerate(layers)}
        for count in range((len(layers) - 1) % step + 1, len(layers), step):
            if {(kind, n % step) for n, kind in enumerate(layers[:count])} == turns:
                return layers[:count]
        return layers

    def _planned(self, policy: Policy, order: Order, of: tuple[LayerSpec, ...], batches: int) -> list[float]:
        layers = self._layers(of, policy.sep_layer)
        placement = self._placement(of, policy.sep_layer, policy.weights)
        block = policy.replace(num_gpu_batches=batches)
        workload = replace(self._job.workload, num_prompts=block.block_size)
        topology = self._job.hardware.topology
        target = Target(topology, order.slots, workspaces_on(self._job.hardware))
        plan = plan_memory(layers, placement, block, target, workload)
        # A head that is larger than any layer goes where a share has room for it, and then needs no slot. What it
        # takes where no share has is no line between the corners: the plan of the policy counts it.
        slots, between = (
            plan.weight_slots,
            slot_sizes(layers, placement, topology, order.slots.weights, False),
        )
        taken = {tier: float(plan.on(tier)) for tier in Tier}
        taken[topology.device] -= sum(slots.device) - sum(between.device)
        taken[Tier.CPU] -= sum(slots.staging) - sum(between.staging)
        return list(taken.values())

    def _make_layers(self, layers: tuple[LayerSpec, ...], sep_layer: bool) -> tuple[Layer, ...]:
        return build_layers(replace(self._job.spec, layers=layers), sep_layer)

    def _place(self, layers: tuple[LayerSpec, ...], sep_layer: bool, split: object) -> Placement:
        return place_weights(self._layers(layers, sep_layer), split, self._job.dtype)  # type: ignore[arg-type]


def _few_tokens(gen_len: int, pages: bool) -> tuple[Sequence[int], Sequence[int]]:
    """The prefill and a token that stands for the decode, whose seconds grow evenly; with `pages` on disk also one
    that writes a page, and the next. Which of them (by place) writes."""
    if gen_len < 5:
        return range(gen_len), ()
    middle = gen_len // 2
    return ([0, middle, middle + 1, middle + 2], [2]) if pages else ([0, middle], ())


def solve(
    figures: Figures,
    capacity: np.ndarray,
    given: Shares | None = None,
    without: Iterable[Column] = (),
    elastic: bool = False,
) -> Solution | None:
    """The shares with the shortest prefill and decode, within `capacity` (bytes by tier); None if nothing fits.

    given: shares that are settled. without: columns that get nothing. elastic: capacities may be exceeded, by as
    few bytes as can be.
    """
    from scipy.optimize import linprog  # takes a while to import, and only a search solves programs

    n, without = len(figures.columns), set(without)
    seconds = figures.base[:-3].reshape(2, _ROWS)
    rows = figures.change[:, :-3].reshape(n, 2, _ROWS)
    if figures.serial:  # each lane waits for the others
        seconds, rows = seconds[:, : len(LANES)], rows[:, :, : len(LANES)]
        limits_seconds, limits_rows = seconds.sum(1, keepdims=True), rows.sum(2, keepdims=True)
    else:
        limits_seconds, limits_rows = seconds, rows
    unit = max(float(np.abs(figures.base[:-3]).max()), float(np.abs(figures.change[:, :-3]).max()), 1e-12)
    width = limits_seconds.shape[1]
    # Variables: the shares, then the seconds of prefill and decode, in `unit`, then what is too much on each tier.
    longest = np.zeros((2 * width, n + 5))
    longest[:, :n] = limits_rows.transpose(1, 2, 0).reshape(2 * width, n) / unit
    longest[:width, n] = longest[width:, n + 1] = -1
    scale = np.maximum(capacity, 1.0)
    room = np.zeros((3, n + 5))
    room[:, :n] = figures.change[:, -3:].T / scale[:, None]
    room[:, n + 2 :] = -np.eye(3)
    whole = np.zeros((len(CLASSES), n + 5))
    for row, what in enumerate(CLASSES):
        whole[row, :n] = [column.what == what for column in figures.columns]
    lanes = rows[:, :, : len(LANES)].sum((1, 2)) / unit
    cost = np.concatenate([_OTHER_LANES * lanes, [1, 1], 1e6 * scale / scale.max() * elastic])
    bounds: list[tuple[float, float | None]] = []
    for column in figures.columns:
        settled = given is not None and any(other.what == column.what for other in given)
        share = given.get(column, 0.0) if given is not None else 0.0
        bounds.append((share, share) if settled else (0, 0 if column in without else 1))
    bounds += [(0, None)] * 2 + [(0, None if elastic else 0)] * 3
    solved = linprog(
        cost,
        A_ub=np.concatenate([longest, room]),
        b_ub=np.concatenate([-limits_seconds.ravel() / unit, (capacity - figures.base[-3:]) / scale]),
        A_eq=whole,
        b_eq=np.ones(len(CLASSES)),
        bounds=bounds,
        method="highs",
    )
    if not solved.success:
        return None
    shares = {c: float(x) for c, x in zip(figures.columns, solved.x, strict=False) if x > 1e-9}
    saved = dict(zip(Tier, -solved.ineqlin.marginals[-3:] * unit / scale, strict=True))
    return Solution(shares, float(solved.x[n] + solved.x[n + 1]) * unit, saved)


def one_codec_each(
    figures: Figures, capacity: np.ndarray, given: Shares | None = None, elastic: bool = False
) -> Solution | None:
    """As `solve`, with one codec for each class and tier, as a policy has: that which had most of it."""
    without: set[Column] = set()
    while (solution := solve(figures, capacity, given, without, elastic)) is not None:
        most: dict[tuple[str, Tier], Column] = {}
        for column in sorted(solution.shares, key=lambda c: solution.shares[c]):
            most[column[:2]] = column
        mixed = [c for c in solution.shares if most[c[:2]] != c]
        if not mixed:
            return solution
        for rival in mixed:
            without.update(c for c in figures.columns if c[:2] == rival[:2] and c != most[rival[:2]])
    return None
