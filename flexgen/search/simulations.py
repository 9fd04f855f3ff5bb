"""Memory plans and simulations of a job's policies and orders.

Each is computed once. Only a part of a large model is simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flexgen.layout.needs import MemoryPlan
from flexgen.layout.passes import Passes
from flexgen.layout.plan import Target, plan_memory
from flexgen.policy import Policy, Tier
from flexgen.predict.job import Job
from flexgen.predict.placed import Placements
from flexgen.predict.prediction import Prediction, predict_job, sampled_tokens
from flexgen.predict.refill import refills
from flexgen.predict.workspaces import workspaces_on
from flexgen.schedule.orders import Order
from flexgen.search.linear import Figures, blocks, longest_lanes, shares_of
from flexgen.search.turnover import turnover

_FEW_LAYERS = 6
"""The transformer layers of the small model whose overlap represents that of deeper models."""
_EXACT_CELLS = 3_000
"""Blocks with more cells than this are simulated for a small model and for some of the tokens."""
_UNLIMITED = 1 << 62
"""The capacity of a tier without a limit, in bytes."""


class Run(NamedTuple):
    """A policy, and the name of its order; None is the policy's own order."""

    policy: Policy
    order: str | None = None


class Extent(NamedTuple):
    """The number of cells that a prediction simulates. exact: whether these are all."""

    cells: int
    exact: bool


class Simulations:
    """The simulations of one job, in any order. `laid_out` counts the cells of all predictions so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        hardware = job.hardware
        # The plan of the whole model decides whether a policy fits. In a model of few layers, shares are coarse,
        # because tensors are not divided, so a tier may exceed its capacity.
        self._unlimited = hardware.replace(capacity=dict.fromkeys(hardware.capacity, _UNLIMITED))
        self._capacity = np.array([float(hardware.capacity.get(tier, 0)) for tier in Tier])
        self._placements = Placements(job.spec, job.dtype)
        self._predictions: dict[tuple[Run, bool], Prediction] = {}
        self.laid_out = 0

    def order(self, run: Run) -> Order:
        """The order of a full block."""
        return replace(self._job, order=run.order).order_for(run.policy)

    def plan(self, run: Run) -> tuple[MemoryPlan, np.ndarray]:
        """The plan, with the slots of the order, and the shortage of each tier in bytes (negative: free bytes)."""
        policy, topology = run.policy, self._job.hardware.topology
        layers = self._placements.layers(policy.sep_layer)
        placement = self._placements.placement(policy.sep_layer, policy.weights)
        target = Target(topology, self.order(run).slots, workspaces_on(self._job.hardware))
        plan = plan_memory(layers, placement, policy, target, self._job.workload)
        return plan, np.array([float(plan.on(tier)) for tier in Tier]) - self._capacity

    def short(self, run: Run) -> list[Tier]:
        """The tiers whose capacity the run exceeds."""
        return [tier for tier, count in zip(Tier, self.plan(run)[1], strict=True) if count > 0]

    def extent(self, policy: Policy, small: bool = False) -> Extent:
        """The extent of a prediction. `small`: of the small model."""
        layers = len(self._placements.layers(policy.sep_layer))
        if small:
            layers = min(layers, _FEW_LAYERS * (2 if policy.sep_layer else 1) + 2)
        if refills(self._job.workload, policy):
            cells = layers * turnover(self._job.workload, policy).timed
            return Extent(cells, small or cells <= _EXACT_CELLS)
        prompts = min(self._job.workload.group_sizes[0], policy.block_size)
        cells, gen_len = layers * -(-prompts // policy.gpu_batch_size), self._job.workload.gen_len
        parts = -Passes.of(self._job.workload, policy).first
        if cells * (parts + gen_len) <= _EXACT_CELLS:
            return Extent(cells * (parts + gen_len), True)
        tokens, _ = sampled_tokens(gen_len, 1, bool(policy.cache.percent(Tier.DISK)))
        return Extent(cells * (parts + len(tokens)), False)

    def prediction(self, run: Run, small: bool = False) -> Prediction:
        """The prediction of a run. `small`: of the small model, with unlimited memory. Raises as `predict` does."""
        if (run, small) not in self._predictions:
            cells, exact = self.extent(run.policy, small)
            self.laid_out += cells
            job, placements = self._small if small else (self._job, self._placements)
            job = replace(job, order=run.order)
            self._predictions[run, small] = predict_job(job, run.policy, None if exact else 1, placements)
        return self._predictions[run, small]

    def fastest(self, run: Run, others: Sequence[Run]) -> Run:
        """The one with the shortest predicted time of `run`, which fits, and those of `others` that fit."""
        fitting = [other for other in others if not self.short(other)]
        return min((run, *fitting), key=lambda one: self.prediction(one).report.total_s) if fitting else run

    def seconds(self, run: Run, figures: Figures) -> float:
        """The seconds of the workload.

        A small workload is simulated. For a large one, the longest lanes by the `figures` of its form and order are
        multiplied by the simulated time of the small model over its bound, because overlap is not perfect.
        """
        if (run, False) in self._predictions or self.extent(run.policy).exact:
            return self.prediction(run).report.total_s
        small = self.prediction(run, small=True).report
        phases = small.phases.values()
        longest = figures.bound(shares_of(run.policy), phases) * blocks(self._job.workload, run.policy)
        return longest * small.total_s / longest_lanes(phases, figures.joined)

    @cached_property
    def _small(self) -> tuple[Job, Placements]:
        """The job with a few of the model's layers, on a machine with unlimited memory.

        The layers are consecutive, from the place where their kinds are mixed most like those of the whole model.
        """
        layers = self._job.spec.layers
        few, counts = min(len(layers), _FEW_LAYERS), Counter(layers)

        def unlike(begin: int) -> float:
            run = Counter(layers[begin : begin + few])
            return sum(abs(run[kind] / few - count / len(layers)) for kind, count in counts.items())

        begin = min(range(len(layers) - few + 1), key=unlike)
        spec = replace(self._job.spec, layers=layers[begin : begin + few])
        return replace(self._job, spec=spec, hardware=self._unlimited), Placements(spec, self._job.dtype)
