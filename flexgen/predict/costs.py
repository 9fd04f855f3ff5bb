"""The cost model: the bytes and the seconds of each step of a schedule.

A step has the chains and the lanes that the runtime gives it, with the bytes that cross each lane. `Hardware`
converts bytes and flops to seconds. Sizes come from layers, placement and layouts. A test compares the bytes with
those that the engine moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from flexgen.layout.passes import Passes
from flexgen.layout.plan import batch_sizes
from flexgen.layout.weights import count_pieces
from flexgen.policy import Policy
from flexgen.predict.cache_costs import CacheCosts
from flexgen.predict.compute_costs import ComputeCosts, CostedCell
from flexgen.predict.fixed_costs import FixedCosts
from flexgen.predict.hidden_costs import HiddenCosts
from flexgen.predict.loads import Loads
from flexgen.predict.placed import PlacedModel
from flexgen.predict.prefix_costs import PrefixCosts
from flexgen.predict.timeline import Costs
from flexgen.results.trace import LaneName
from flexgen.schedule.admission import joint_cells
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, all_steps
from flexgen.workload import Workload

_Key = tuple[Op, int, int, CostedCell, bool]


@dataclass(frozen=True)
class CostedBlock:
    """A block of `prompts` prompts that runs in `order`.

    tokens: the passes of the grid, numbered as in `Passes` (up to 0: the prefill). None is all passes. If some are
        missing, the bytes that a token reads of a cache on disk are interpolated linearly.
        An element may also be a sequence with the token of each batch.
    flushing: the indices of the tokens that write a page.
    batches: the rows of each batch; None divides the prompts by the policy.
    attending: the number of rows of each batch that get a token; None is all rows. In the decode, attention on the
        CPU does not read the cache of the other rows.
    """

    prompts: int
    order: Order
    tokens: Sequence[int | Sequence[int]] | None = None
    flushing: Collection[int] = ()
    batches: Sequence[int] | None = None
    attending: Sequence[int] | None = None


class _Pass(NamedTuple):
    """The token and the cell of each batch in a pass, and the batch whose cost includes the decoding of weights for
    all batches.

    This batch computes the most tokens. If several do, it is the first of them. If any batch has too many rows for
    products with encoded weights, this one has.
    """

    tokens: Sequence[int]
    cells: Sequence[CostedCell]
    decoding: int

    @classmethod
    def of(cls, token: int | Sequence[int], cells: Sequence[CostedCell], passes: Passes) -> _Pass:
        """passes: with `Passes.joint_tokens` if no data moves between cells."""
        tokens = [token] * len(cells) if isinstance(token, int) else token
        computed = [cell.rows * passes.span(one).new for cell, one in zip(cells, tokens, strict=True)]
        most = max(range(len(cells)), key=computed.__getitem__)
        made = list(cells)
        for group in joint_cells(computed, passes.joint_tokens):
            joint = sum(computed[k] for k in group), sum(cells[k].rows for k in group)
            for k in group if len(group) > 1 else ():
                made[k] = cells[k]._replace(joint=joint)
        return cls(tokens, made, most)


class StepCosts:
    """The work of each step of one block of a workload. Loads of weights are equal for all tokens."""

    def __init__(self, model: PlacedModel, policy: Policy, workload: Workload, block: CostedBlock) -> None:
        passes = Passes.expected(workload, policy)
        every_token = range(passes.first, workload.gen_len)
        self._model = model
        self._order = block.order
        batches = block.batches or batch_sizes(policy, block.prompts)
        self._cells = [CostedCell(*rows) for rows in zip(batches, block.attending or batches, strict=True)]
        tokens: Sequence[int | Sequence[int]] = block.tokens or every_token
        self._flushing = block.flushing
        self._timed: dict[_Key, Costs] = {}
        self._prefix = PrefixCosts(model, policy, workload)
        self.alike = self._prefix.alike
        self.weight_pieces = count_pieces(model.layouts, len(batches))
        sizes = {count for rows, attending, _ in self._cells for count in (rows, attending)}
        self._cache = CacheCosts(model, policy, workload, sizes, len(tokens) == len(every_token))
        self._hidden = HiddenCosts(model, policy, passes, sizes, block.order.serial)
        gathers_rows = self._hidden.gathers_rows
        moves = gathers_rows or any(layout.runs for layout in model.layouts)
        closes_up = passes.rows > 0 and not moves and model.hardware.topology.closes_up(policy)
        joint = replace(passes, closes_up=closes_up)
        self._passes = [_Pass.of(token, self._cells, joint) for token in tokens]
        fixed = FixedCosts(model, policy, workload, batches, gathers_rows)
        splits = block.order.splits_attention
        self._computation = ComputeCosts(model, self._cache, passes, splits, gathers_rows, fixed)

    @property
    def feeds_ids(self) -> bool:
        """As `Grid.feeds_ids`."""
        return self._hidden.feeds_ids

    @property
    def flushes(self) -> int:
        """The number of tokens of the decode that write pages of a cache on disk."""
        return self._cache.flushes

    @property
    def cached_token_bytes(self) -> int:
        """The bytes of one token of a batch of the first size in the cache, in all layers."""
        rows = self._cells[0].rows
        cells = (n for n in self._model.alike.cells if self._model.layers[n].has_cache)
        return sum(s.token_bytes(1) for n in cells for s in self._cache.layout(n, rows).segments)

    def __call__(self, step: Step) -> Costs:
        """The step's chains as (lane, seconds)."""
        key = self._key(step)
        if key not in self._timed:
            self._timed[key] = [[(load.lane, load.seconds) for load in chain] for chain in self._loads(key)]
        return self._timed[key]

    def loads(self, step: Step) -> Loads:
        """The step's chains, with their bytes."""
        return self._loads(self._key(step))

    def busy(self, token: int) -> dict[LaneName, float]:
        """The seconds of work of each lane for a token of the grid."""
        total: dict[LaneName, float] = {}
        for step, count in self._kinds:
            for chain in self(step._replace(token=token)):
                for lane, seconds in chain:
                    total[lane] = total.get(lane, 0.0) + count * seconds
        return total

    @cached_property
    def _kinds(self) -> list[tuple[Step, int]]:
        """One step of each kind in a token, with the number of steps of that kind."""
        layers, alike = range(len(self._model.layers)), Counter(self._model.alike.cells)
        counts: Counter[_Key] = Counter()
        steps: dict[_Key, Step] = {}
        splits = self._order.splits_attention
        for step in all_steps(Grid(1, 1, len(self._cells), self.weight_pieces, splits_attention=splits)):
            weights = step.op is Op.LOAD_WEIGHTS
            for layer in layers if weights else alike:
                one = Step(step.op, 0, layer, step.batch)
                key = self._key(one)
                counts[key] += 1 if weights else alike[layer]
                steps.setdefault(key, one)
        return [(step, counts[key]) for key, step in steps.items()]

    def _key(self, step: Step) -> _Key:
        """The values that a step's work depends on: (op, layer, token or piece, cell, flag).

        flag: for computation, whether the batch decodes weights for those of its visit; for a store of cache, whether
            the token represents those that write pages.
        """
        op, i, j, k = step
        if op is Op.LOAD_WEIGHTS:
            return op, self.alike.weights[j], k, CostedCell(0, 0), False
        token, cell = self._passes[i].tokens[k], self._cells[k]
        match op:
            case Op.LOAD_HIDDEN | Op.STORE_HIDDEN:  # equal between any two layers
                layer = j if j == self._model.last else min(j, 1)
                return op, layer, token, cell, False
            case Op.COMPUTE | Op.PROJECT:
                cell = self._passes[i].cells[k]
                return op, self._model.alike.cells[j], token, cell, k == self._passes[i].decoding
            case Op.STORE_CACHE:
                return op, self._model.alike.cells[j], token, cell, i in self._flushing
            case _:
                return op, self._model.alike.cells[j], token, cell, False

    def _loads(self, key: _Key) -> Loads:
        op, layer, token, cell, flag = key
        rows, attending, _ = cell
        match op:
            case Op.LOAD_WEIGHTS:
                weights = self._model.load_weights(layer, token, self.weight_pieces)
                return (*weights, *(self._prefix.load(layer) if token == 0 else ()))
            case Op.LOAD_CACHE:
                return self._cache.load(layer, token, rows)
            case Op.LOAD_HIDDEN:
                return self._hidden.load(layer, token, rows)
            case Op.PROJECT:
                return self._computation.project(layer, token, rows, flag)
            case Op.ATTEND:
                return self._computation.attend(layer, token, rows, attending)
            case Op.LOAD_ATTENTION:
                return self._computation.load_attention(layer, token, rows)
            case Op.COMPUTE:
                return self._computation.compute(layer, token, cell, flag)
            case Op.STORE_HIDDEN:
                return self._hidden.store(layer, token, rows)
            case Op.STORE_CACHE:
                return self._cache.store(layer, token, rows, flag)
