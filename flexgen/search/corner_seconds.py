"""The seconds of the steps of a block, by op and row of the linear program."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from flexgen.layout.passes import Passes
from flexgen.policy import Policy, Tier
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.placed import PlacedModel
from flexgen.predict.prediction import decode_seconds
from flexgen.predict.refill import refills
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, all_steps
from flexgen.search.linear import IN_TURN, LANE_ROW, ROWS, UNHIDDEN
from flexgen.workload import Workload

_TURN = (Op.LOAD_HIDDEN, Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENTION, Op.COMPUTE, Op.STORE_HIDDEN)
"""The steps of a batch that wait for each other in any order."""

_Lines = list[list[list[float]]]
"""The seconds (2, rows, passes) of the steps of one op: those of the first batch, and of each further one."""


class _Sample(NamedTuple):
    """The passes that are timed.

    parts: passes over parts of prompts, which make no new token.
    new: the tokens that the other passes make: the prefill's, and a few that represent the decode.
    flushing: the indices in `new` of the tokens that write a page.
    """

    parts: range
    new: Sequence[int]
    flushing: Sequence[int]

    @classmethod
    def of(cls, workload: Workload, policy: Policy) -> _Sample:
        parts, gen_len = range(Passes.of(workload, policy).first, 0), workload.gen_len
        if refills(workload, policy):
            return cls(parts, sorted({0, min(1, gen_len - 1), gen_len - 1}), ())
        return cls(parts, *_few_tokens(gen_len, policy.cache.percent(Tier.DISK) > 0))

    @property
    def tokens(self) -> list[int]:
        """The numbers of the passes."""
        return [*self.parts, *self.new]


class BlockSeconds:
    """The seconds of the steps of a block in an order.

    model, repeated: a model with one layer of each kind, and for each of its layers, how often it counts.
    """

    def __init__(
        self, model: PlacedModel, repeated: Sequence[int], policy: Policy, workload: Workload, order: Order
    ) -> None:
        self._repeated = repeated
        self._policy = policy
        self._workload = workload
        self._order = order
        self._sample = _Sample.of(workload, policy)
        lead = len(self._sample.parts)
        flushing = [lead + n for n in self._sample.flushing]
        block = CostedBlock(policy.block_size, order, self._sample.tokens, flushing)
        self._costs = StepCosts(model, policy, workload, block)
        self._entry_costs: StepCosts | None = None
        passes = Passes.of(workload, policy)
        if passes.rows:  # the prompts of a batch are computed in several cells, between those of other rows
            rows = passes.cells(policy.gpu_batch_size)[1].rows
            cell = CostedBlock(rows, order, [0], batches=[rows] * policy.num_gpu_batches)
            self._entry_costs = StepCosts(model, policy, workload, cell)
            self._entry_cells = policy.gpu_batch_size / rows

    def of_ops(self, ops: Collection[Op]) -> dict[Op, np.ndarray]:
        """The seconds (2, parts, rows) of the steps of each op, as a line in the number of batches. The parts are
        prefill and decode; if rows end early, they are the prefill, and the first and the last pass of the decode."""
        passes, batches = len(self._sample.tokens), self._policy.num_gpu_batches
        sums: dict[Op, _Lines] = {op: [[[0.0] * passes for _ in range(ROWS)] for _ in range(2)] for op in ops}
        shape = 1, len(self._repeated), batches, self._costs.weight_pieces
        for step in all_steps(Grid(*shape, splits_attention=self._order.splits_attention)):
            if step.op in sums:
                self._add(sums[step.op], step)
        taken = {op: np.array([[*map(self._parts, row)] for row in lines]) for op, lines in sums.items()}
        if batches > 1:  # from the first batch and each further one to a line in their number
            for first_and_further in taken.values():
                first_and_further[0] -= first_and_further[1]
        return {op: lines.swapaxes(1, 2) for op, lines in taken.items()}

    def _add(self, lines: _Lines, step: Step) -> None:
        """Add the seconds of a step in each pass of the sample."""
        op, _, layer, batch = step
        weights, times = op is Op.LOAD_WEIGHTS, self._repeated[layer]
        first, own = lines[0], lines[batch > 0 and not weights]
        for n, token in enumerate(self._sample.tokens):
            costs, cells = self._costs, 1.0
            if enters := self._entry_costs is not None and token == 0:
                costs, cells = self._entry_costs, 1.0 if weights else self._entry_cells
            longest = 0.0
            for chain in costs(Step(op, n, layer, batch)):
                for lane, seconds in chain:
                    own[LANE_ROW[lane]][n] += times * cells * seconds
                longest = max(longest, sum(seconds for _, seconds in chain))
            if op in _TURN and batch == 0 and not enters:
                first[IN_TURN][n] += times * longest
            if weights and self._order.slots.weights == 1:
                first[UNHIDDEN][n] += times * longest
            if op is Op.COMPUTE:
                own[UNHIDDEN][n] += times * cells * longest

    def _parts(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """The seconds of the parts, from those of the passes."""
        workload, lead = self._workload, len(self._sample.parts)
        prefill, decode = sum(seconds[: lead + 1]), seconds[lead + 1 :]
        if refills(workload, self._policy):
            return (prefill, decode[0], decode[-1]) if decode else (prefill, 0.0, 0.0)
        if not any(seconds):
            return 0.0, 0.0
        all_tokens = decode_seconds(
            seconds[lead:], self._sample.new, self._sample.flushing, workload.gen_len, self._costs.flushes
        )
        return prefill, all_tokens / workload.tokens_in_pass(self._policy.guess)


def _few_tokens(gen_len: int, pages: bool) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens to time, and the indices of those that write a page.

    The tokens are the prefill's and one that represents the decode, whose seconds grow linearly. With `pages` on
    disk, there are also a token that writes a page and the token after it.
    """
    if gen_len < 5:
        return range(gen_len), ()
    middle = gen_len // 2
    return ([0, middle, middle + 1, middle + 2], [2]) if pages else ([0, middle], ())
