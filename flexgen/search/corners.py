"""The coefficients of a linear program, from the cost model and the memory plan.

Both are evaluated at the corners: policies with all weights on one tier, the whole cache on one tier, and all
activations on one tier. No formula of a size or of a time is duplicated here. The blocks that compute a shared prefix
count as a part of each block of prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from flexgen.errors import HardwareError, PolicyError
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.prefix import prefix_policy, prefix_slots, prefix_workloads
from flexgen.layout.weight_slots import slot_sizes
from flexgen.models.spec import LayerSpec
from flexgen.policy import Policy, Share, Split, Tier
from flexgen.predict.job import Job
from flexgen.predict.placed import PlacedModel, Placements
from flexgen.predict.refill import refills
from flexgen.predict.workspaces import workspaces_on
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Op
from flexgen.search.corner_seconds import BlockSeconds
from flexgen.search.linear import ROWS, Column, Figures, blocks
from flexgen.search.turnover import turnover
from flexgen.workload import Workload

_DEPENDS = {
    Op.LOAD_WEIGHTS: ("weights",),
    Op.LOAD_CACHE: ("cache",),
    Op.LOAD_HIDDEN: ("activations", "weights"),  # for the first layer, rows of the embedding table
    **dict.fromkeys((Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENTION, Op.COMPUTE), ("weights", "cache")),
    Op.STORE_HIDDEN: ("activations",),
    Op.STORE_CACHE: ("cache",),
}
"""The classes of data that the seconds of a step depend on. A shared prefix arrives with the weights, and its home
depends on the cache."""

_Kinds = tuple[LayerSpec, ...]


class _Corner(NamedTuple):
    """The values of a policy that stores a class of data by one column, in three lines: the part that does not depend
    on the number of batches, the part of each batch, and the part of a shared prefix, which runs once for all blocks.

    seconds: (lines, parts, rows). The parts are prefill and decode; if rows end early, they are the prefill, and
        the first and the last pass of the decode.
    bytes: (lines, tiers).
    """

    column: Column
    seconds: np.ndarray
    bytes: np.ndarray


class _Addition(NamedTuple):
    """The bytes of layers of one kind: `times` the difference between two models of that kind."""

    times: float
    more: Placements
    fewer: Placements


class Corners:
    """The figures of one job, for any block shape."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._counts = Counter(job.spec.layers)
        self._placements: dict[_Kinds, Placements] = {}
        self._small: dict[int, tuple[Placements, list[_Addition]]] = {}
        self._workspaces = workspaces_on(job.hardware)
        self._models: dict[tuple[bool, Split], PlacedModel] = {}
        self._known: dict[tuple[Policy, tuple[Column, ...]], list[_Corner]] = {}

    def order(self, form: Policy) -> Order:
        """The order of policies of this form, which does not depend on their free shares."""
        return self._job.order_for(form)

    def figures(self, form: Policy, columns: Sequence[Column]) -> Figures:
        """The figures of blocks of the form's shape. Columns without rates on the machine are left out."""
        several = form.num_gpu_batches > 1
        # Times and bytes of several batches are linear in their number.
        first = _with_batches(form, 2 if several else 1)
        key = first, tuple(columns)
        if key not in self._known:
            self._known[key] = self._evaluate(first, columns)
        seconds, nbytes = self._times(form), np.array([1.0, form.num_gpu_batches, 0.0])
        values = {
            corner.column: np.concatenate(
                [np.einsum("lpq,lpr->qr", seconds, corner.seconds).ravel(), nbytes @ corner.bytes]
            )
            for corner in self._known[key]
        }
        start = {column.what: column for column in reversed(values)}
        base = values[start["weights"]]
        change = [values[column] - values[start[column.what]] for column in values]
        serial = self.order(form).serial
        return Figures(tuple(values), base, np.array(change), serial, refills(self._job.workload, form))

    def _times(self, form: Policy) -> np.ndarray:
        """(lines, parts, phases): how often a block has the seconds of each line of a corner."""
        workload = self._job.workload
        several, share = form.num_gpu_batches, 1 / blocks(workload, form)
        if not refills(workload, form):
            return np.array([1.0, several, share])[:, None, None] * np.eye(2)
        # The prompts that enter are computed in passes of the decode, so these load the weights for both.
        turns, later = turnover(workload, form), max(workload.gen_len - 2, 1)
        last = min(max((turns.token - 1) / later, 0.0), 1.0)
        decode = np.outer([turns.passes * share, turns.cells * share, 0], [1 - last, last])
        # With one batch, the first line has all of its seconds.
        alone = turns.entering * share if several > 1 else 1.0
        prefill = np.array([alone, several, share])[:, None]
        phases = np.zeros((3, 3, 2))
        phases[:, :1, 0], phases[:, 1:, 1] = prefill, decode
        return phases

    def _evaluate(self, form: Policy, columns: Sequence[Column]) -> list[_Corner]:
        start = {column.what: column for column in reversed(columns)}
        order = self.order(form)

        def at(columns: Mapping[str, Column]) -> Policy:
            return form.replace(**{what: {c.tier: Share(100, c.codec)} for what, c in columns.items()})

        base = at(start)
        seconds = self._seconds(base, order, list(Op))
        at_start = self._corner(columns[0], base, order, seconds)
        found = []
        for column in columns:
            if column == start[column.what]:
                found.append(at_start._replace(column=column))
                continue
            policy = at(start | {column.what: column})
            # Steps that do not depend on this class of data have the same times as at the start.
            others = [op for op in Op if column.what in _DEPENDS[op]]
            if column.what == "cache" and prefix_workloads(self._job.workload, policy):
                others.append(Op.LOAD_WEIGHTS)
            try:
                taken = seconds | self._seconds(policy, order, others)
                found.append(self._corner(column, policy, order, taken))
            except (HardwareError, PolicyError):
                continue  # the codec has no figures, or does not support the head size
        return found

    def _corner(
        self, column: Column, policy: Policy, order: Order, seconds: Mapping[Op, np.ndarray]
    ) -> _Corner:
        block = np.sum(list(seconds.values()), axis=0)
        nbytes = self._bytes(policy, order)
        return _Corner(
            column,
            np.concatenate([block, self._prefix_seconds(policy)[None]]),
            np.concatenate([nbytes, np.zeros_like(nbytes[:1])]),
        )

    def _prefix_seconds(self, policy: Policy) -> np.ndarray:
        """(parts, rows): the seconds of the blocks that compute the prefix. The plan of a block has their bytes."""
        one, phases = prefix_policy(policy), np.zeros((2, ROWS))
        order = self._job.order_for(one)
        order = replace(order, slots=prefix_slots(order.slots))
        parts = prefix_workloads(self._job.workload, policy)
        for n, part in enumerate(parts, 1):
            times = self._job.workload.groups if n == len(parts) else 1  # each group has its own last part
            seconds = sum(self._seconds(one, order, list(Op), part).values())
            phases += times * np.sum(seconds, axis=0)
        if refills(self._job.workload, policy):
            return np.pad(phases, ((0, 1), (0, 0)))
        return phases

    def _seconds(
        self, policy: Policy, order: Order, ops: Collection[Op], workload: Workload | None = None
    ) -> dict[Op, np.ndarray]:
        """The seconds of the steps of each of `ops`, see `BlockSeconds`. workload: None is that of the job.

        They come from a model with one layer of each kind, which counts as often as the whole model has it.
        """
        model = self._model(policy)
        repeated = [self._counts[one.layer_spec] if one.layer_spec else 1 for one in model.layers]
        return BlockSeconds(model, repeated, policy, workload or self._job.workload, order).of_ops(ops)

    def _bytes(self, policy: Policy, order: Order) -> np.ndarray:
        """The bytes (2, tiers): from the plans of small models with few batches, plus those of the other layers."""
        few, additions = self._additions(order.slots.weights)
        batches = (2, 3) if policy.num_gpu_batches > 1 else (1,)
        blocks = [_with_batches(policy, n) for n in batches]
        planned = cache(lambda model: np.array([self._planned(block, order, model) for block in blocks]))
        deep = planned(few)
        for added in additions:
            deep = deep + added.times * (planned(added.more) - planned(added.fewer))
        each = deep[-1] - deep[0]
        return np.stack([deep[0] - batches[0] * each, each])

    def _additions(self, step: int) -> tuple[Placements, list[_Addition]]:
        """A small model with `step` weight slots, and the additions of the whole model's other layers."""
        if step not in self._small:
            few, least = self._few_layers(step), (self._job.spec.num_layers - 1) % step + 1
            # The layers that are added use all slots equally often.
            additions = [
                _Addition(
                    count / step,
                    self._placements_of((kind,) * (least + step)),
                    self._placements_of((kind,) * least),
                )
                for kind, count in (self._counts - Counter(few)).items()
            ]
            self._small[step] = self._placements_of(few), additions
        return self._small[step]

    def _few_layers(self, step: int) -> tuple[LayerSpec, ...]:
        """The fewest first layers of the model whose weight slots have the same sizes as those of all layers."""
        layers = self._job.spec.layers
        turns = {(kind, n % step) for n, kind in enumerate(layers)}
        for count in range((len(layers) - 1) % step + 1, len(layers), step):
            if {(kind, n % step) for n, kind in enumerate(layers[:count])} == turns:
                return layers[:count]
        return layers

    def _planned(self, block: Policy, order: Order, placements: Placements) -> list[float]:
        layers = placements.layers(block.sep_layer)
        placement = placements.placement(block.sep_layer, block.weights)
        workload = replace(self._job.workload, num_prompts=block.block_size)
        topology = self._job.hardware.topology
        target = Target(topology, order.slots, self._workspaces)
        plan = plan_memory(layers, placement, block, target, workload)
        # A head that is larger than any layer needs no slot if a share has room for it. Its slot is not linear
        # between the corners, so it is left out here; the plan of each policy counts it.
        slots, between = (
            plan.weight_slots,
            slot_sizes(layers, placement, topology, order.slots.weights, False),
        )
        taken = {tier: float(plan.on(tier)) for tier in Tier}
        taken[topology.device] -= sum(slots.device) - sum(between.device)
        taken[Tier.CPU] -= sum(slots.staging) - sum(between.staging)
        return list(taken.values())

    def _model(self, policy: Policy) -> PlacedModel:
        """A model with one layer of each kind."""
        key = policy.sep_layer, policy.weights
        if key not in self._models:
            placements = self._placements_of(tuple(self._counts))
            layers, placement = placements.layers(policy.sep_layer), placements.placement(*key)
            self._models[key] = PlacedModel(layers, placement, self._job.hardware)
        return self._models[key]

    def _placements_of(self, kinds: _Kinds) -> Placements:
        """The placements of a model with these layers."""
        if kinds not in self._placements:
            spec = replace(self._job.spec, layers=kinds)
            self._placements[kinds] = Placements(spec, self._job.dtype)
        return self._placements[kinds]


def _with_batches(policy: Policy, batches: int) -> Policy:
    """`policy` with another number of batches, and as many prompts that enter for each batch as before."""
    entering = round(policy.prefill_rows * batches / policy.num_gpu_batches)
    return policy.replace(num_gpu_batches=batches, prefill_rows=max(entering, min(policy.prefill_rows, 1)))
