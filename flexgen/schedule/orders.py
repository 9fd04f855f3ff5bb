"""The available orders of steps.

To add one, write a generator and decorate it with `@order()`:

    @order()
    def my_order(grid): ...

You can then choose it by name with `OptLM(..., order="my_order")`, and with `--order my_order` if it is in this
file. The arguments of the decorator set the number of buffers and whether attention is a separate step.
`schedule.needs` defines which orders are legal; `schedule.check` proves that an order is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import count, pairwise, product
from typing import NamedTuple

from flexgen.errors import ScheduleError, did_you_mean, shown
from flexgen.schedule.steps import LOADS, STORES, Cell, Grid, Op, Step, check


@dataclass(frozen=True)
class Slots:
    """The number of buffers of each kind.

    weights: buffers for the weights of a layer.
    cells: buffers for the inputs and outputs of a cell.
    decoded: buffers for the decoded weights of a layer; an order needs one for each layer that it interleaves.

    The number of slots limits how far the lanes run ahead of the computation. With one slot, nothing can be
    fetched until the slot's contents have been used, so one slot is enough only for an order without overlap.
    """

    weights: int = 2
    cells: int = 2
    decoded: int = 1

    def fit(self, held: Slots) -> bool:
        """Whether `held` has enough slots of each kind."""
        return all(getattr(self, f.name) <= getattr(held, f.name) for f in fields(self))


@dataclass(frozen=True)
class Order:
    """A generator of the steps of a grid, and the slots that the grid needs.

    splits_attention: attention is a separate step of each cell. serial: each step waits for the previous one, so
    nothing overlaps. for_comparison: the order imitates another engine, and the search never chooses it.
    """

    name: str
    generate: Callable[[Grid], Iterator[Step]]
    slots: Slots
    splits_attention: bool = False
    serial: bool = False
    for_comparison: bool = False

    def __call__(self, grid: Grid) -> Iterator[Step]:
        return self.generate(grid)

    def grid(
        self,
        tokens: int,
        layers: int,
        batches: int,
        weight_pieces: int,
        slots: Slots | None = None,
        feeds_ids: bool = False,
    ) -> Grid:
        """The grid that the order runs on. `slots`: the slots of another order, if they are already allocated."""
        slots = slots or self.slots
        shape = tokens, layers, batches, weight_pieces, slots.weights, slots.cells
        # In a serial order the host has the ids before the next token begins.
        return Grid(*shape, self.splits_attention, feeds_ids and not self.serial)


ORDERS: dict[str, Order] = {}


def order(
    *,
    slots: Slots = Slots(),
    splits_attention: bool = False,
    serial: bool = False,
    for_comparison: bool = False,
) -> Callable[[Callable[[Grid], Iterator[Step]]], Order]:
    """Return a decorator that registers a generator of steps as an order, under the name of the function.

    slots: the buffers that the order needs.
    splits_attention: the order yields four steps for the computation of a cell (see `Grid.computing`), not one.
    serial: each step waits for the previous one, so nothing overlaps.
    for_comparison: the search never chooses the order.
    """

    def register(generate: Callable[[Grid], Iterator[Step]]) -> Order:
        made = Order(generate.__name__, generate, slots, splits_attention, serial, for_comparison)
        ORDERS[made.name] = made
        return made

    return register


def arriving_weights(grid: Grid) -> Iterator[list[Step]]:
    """For each cell, the weights to issue with it: those with a free slot, spread over the batches.

    In the first layer, all of them come with the last batch. Its ids may use the same lane, and no batch has anything
    else to compute until they are there.
    """
    for number, visits in enumerate(grid.turns.arrivals(grid.tokens)):
        visit_of = (divmod(other, grid.layers) for other in visits)
        steps = [Step(Op.LOAD_WEIGHTS, *visit, n) for visit in visit_of for n in range(grid.weight_pieces)]
        if number % grid.layers == 0:
            yield from (list[Step]() for _ in range(grid.batches - 1))
            yield steps
        else:
            yield from _spread(steps, grid.batches)


def _spread(steps: list[Step], batches: int) -> list[list[Step]]:
    """The steps to issue with each batch: spread evenly, earliest first."""
    ends = [-(-k * len(steps) // batches) for k in range(batches + 1)]
    return [steps[first:last] for first, last in pairwise(ends)]


@order(slots=Slots(weights=1, cells=1), serial=True)
def normal(grid: Grid) -> Iterator[Step]:
    """No overlap: a cell fetches everything it needs right before it computes."""
    for i, j, k in grid.cells():
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        yield from (Step(op, i, j, k) for op in (*LOADS, *grid.computing, *STORES))


@order()
def overlap_single_batch(grid: Grid) -> Iterator[Step]:
    """While a layer computes, load the next cell's cache and the next weights that have a free slot.

    Hidden states go straight from one layer to the next: with one batch, there is no other computation that could
    hide their transfer. If attention is a step of its own, its output is loaded before these weights. Otherwise the
    layer would wait for all of them, and then the link would wait for the layer, whose slot further weights need.
    """
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    for cell, arriving in zip(grid.cells(), arriving_weights(grid), strict=True):
        i, j, k = cell
        yield Step(Op.LOAD_HIDDEN, i, j, k)  # first: rows of a table on disk use the same lane
        if not grid.splits_attention:
            yield from arriving
        following = grid.cell_after(cell, 1)
        # With one layer and one batch, the next cell reads the cache that this one stores: no early load.
        early = following is not None and following[1:] != cell[1:]
        if following and early:
            yield Step(Op.LOAD_CACHE, *following)
        yield from (Step(op, i, j, k) for op in grid.computing[:-1])
        if grid.splits_attention:
            yield from arriving
        yield from (Step(op, i, j, k) for op in (Op.COMPUTE, *STORES))
        if following and not early:
            yield Step(Op.LOAD_CACHE, *following)


@order()
def overlap_multi_batch(grid: Grid) -> Iterator[Step]:
    """While a batch computes, load the next batch's cache and hidden states, store the previous batch's, and
    load some pieces of the next weights (algorithm 1 of the paper)."""
    if grid.batches == 1:  # the next cell's hidden states are this cell's output: nothing to overlap
        yield from overlap_single_batch(grid)
        return
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    yield Step(Op.LOAD_HIDDEN, 0, 0, 0)
    for cell, arriving in zip(grid.cells(), arriving_weights(grid), strict=True):
        yield from arriving
        if following := grid.cell_after(cell, 1):
            yield Step(Op.LOAD_CACHE, *following)
            yield Step(Op.LOAD_HIDDEN, *following)
        yield from (Step(op, *cell) for op in (*grid.computing, *STORES))


class _Distances(NamedTuple):
    """The numbers of cells between steps of a cell and its PROJECT, in `overlap_cpu_attention`.

    loads: LOAD_CACHE and LOAD_HIDDEN are issued that many cells earlier. compute: COMPUTE and STORE_HIDDEN are issued
    that many cells later. store_cache: so is STORE_CACHE.
    """

    loads: int
    compute: int
    store_cache: int

    @classmethod
    def of(cls, grid: Grid) -> _Distances:
        in_hand = min(grid.batches, grid.cell_slots)
        # COMPUTE is issued right after its attention output arrives. With enough cells it is issued after the next
        # PROJECT instead: then neither the device nor the host waits while queries and outputs cross the link.
        compute = 2 if in_hand > 3 else 1
        # With two batches, prompts may enter in one cell, whose keys and values the host stores. Before the attention
        # of the other cell, this store would delay the attention. After it, the store overlaps with products of the
        # device.
        late = grid.splits_attention and grid.batches == 2 and grid.layers > 1 and grid.cell_slots > 3
        return cls(1 if in_hand > compute + 1 else 0, compute, 3 if late else compute)


@order(slots=Slots(weights=3, cells=4, decoded=2), splits_attention=True)
def overlap_cpu_attention(grid: Grid) -> Iterator[Step]:
    """While the host computes attention for a batch, the device projects the next batch and finishes the previous
    one, and the next layer's weights arrive (as in MoE-Lightning, arXiv 2411.11217).

    Use it with whole layers (`sep_layer = false`): an MLP that is a separate unit has no attention to overlap with.
    """
    if grid.batches == 1:  # the next cell's hidden states are this cell's output: nothing to overlap
        yield from overlap_single_batch(grid)
        return
    apart, splits = _Distances.of(grid), grid.splits_attention
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    for n in range(apart.loads):
        yield from _steps(LOADS, grid.cell(n))
    cells, arriving = grid.tokens * grid.layers * grid.batches, _weights_after_transfers(grid, apart.compute)
    for n, weights in zip(range(cells + apart.store_cache), arriving, strict=False):
        computed = _steps((Op.COMPUTE, Op.STORE_HIDDEN), grid.cell(n - apart.compute))
        stored = _steps((Op.STORE_CACHE,), grid.cell(n - apart.store_cache))
        finished = [*stored, *computed] if apart.store_cache > apart.compute else [*computed, *stored]
        yield from _steps(LOADS, grid.cell(n + apart.loads))
        yield from _steps((Op.PROJECT,) if splits else (), grid.cell(n))
        if apart.compute > 1:
            yield from finished
        yield from _steps((Op.ATTEND,) if splits else (), grid.cell(n))
        yield from _steps((Op.LOAD_ATTENTION,) if splits else (), grid.cell(n - 1))
        yield from weights
        if apart.compute == 1:
            yield from finished


def _steps(ops: Iterable[Op], cell: Cell | None) -> list[Step]:
    """These steps of a cell; none outside the grid."""
    return [Step(op, *cell) for op in ops] if cell else []


def _weights_after_transfers(grid: Grid, compute: int) -> Iterator[list[Step]]:
    """The weights to issue with cell 0, 1, ... (without end), after the short transfers of the cell.

    Those of the next visit are spread over the batches, one cell early, so that the first PROJECT of a layer does not
    wait for its last piece. But the layer that had their slot must have computed every batch first.

    compute: see `_Distances`.
    """
    number = 0  # the cell whose share of the next visit's weights comes next
    for issuing in count():
        issued: list[Step] = []
        while max(number - 1, _cell_after_slot(grid, number // grid.batches + 1) + compute) <= issuing:
            visit, batch = divmod(number, grid.batches)
            if following := grid.visit(0, 0, visit + 1):
                pieces = [Step(Op.LOAD_WEIGHTS, *following, piece) for piece in range(grid.weight_pieces)]
                issued += _spread(pieces, grid.batches)[batch]
            number += 1
        yield issued


def _cell_after_slot(grid: Grid, visit: int) -> int:
    """The number of the first cell after the visit that had the weight slot of visit number `visit` before it."""
    return (visit + 1 - grid.weight_slots) * grid.batches


@order(slots=Slots(weights=1), for_comparison=True)
def flexgen(grid: Grid) -> Iterator[Step]:
    """FlexGen's own schedule, as its published cost model describes it, for comparison.

    All weights of a layer are loaded with its first batch and add to its time; only the transfers of a cell overlap.
    FlexGen waits for the whole device after every cell, and computes CPU attention in its main thread. Its cost
    model for decoding agrees: weight loading + the longest of cache, hidden states and computation.
    """
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    for cell in grid.cells():
        i, j, k = cell
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        # The next cell's hidden states are loaded early, unless this cell is the one that stores them.
        early = grid.batches > 1
        if not early or cell == (0, 0, 0):
            yield Step(Op.LOAD_HIDDEN, i, j, k)
        following = grid.cell_after(cell, 1)
        cache_early = following is not None and following[1:] != cell[1:]
        if following and cache_early:
            yield Step(Op.LOAD_CACHE, *following)
        if following and early:
            yield Step(Op.LOAD_HIDDEN, *following)
        yield from (Step(op, i, j, k) for op in (*grid.computing, *STORES))
        if following and not cache_early:
            yield Step(Op.LOAD_CACHE, *following)


def unknown_order(name: object) -> str:
    """The error message for an order that is not registered."""
    known = f"known: {', '.join(sorted(ORDERS))}{did_you_mean(name, ORDERS)}"
    return f"order {shown(name)} is not known; {known}. Give a known name, or register your order with @order"


def check_order(name: str) -> None:
    """Raise ScheduleError for an order that is unknown, illegal or incomplete.

    The order is checked on small grids of every kind, so that no run fails halfway.
    """
    if not isinstance(name, str) or name not in ORDERS:
        raise ScheduleError(unknown_order(name))
    for tokens, layers, batches, pieces in product((1, 3), (1, 2, 5), (1, 2, 5), (1, 2)):
        grid = ORDERS[name].grid(tokens, layers, batches, pieces)
        try:
            check(ORDERS[name](grid), grid)
            if grid.splits_attention:  # its grid has no such steps if the host computes no attention
                whole = replace(grid, splits_attention=False)
                check(ORDERS[name](whole), whole)
        except ScheduleError as error:
            shape = f"{tokens} tokens, {layers} layers, {batches} batches and {pieces} pieces of weights"
            raise ScheduleError(f"order {shown(name)} with {shape}: {error}") from None


def order_for(overlap: bool, num_gpu_batches: int, host_attends: bool = False) -> str:
    """The name of the order for a policy. `host_attends`: the host computes attention for a device with its own
    memory."""
    if not overlap:
        return normal.name
    if num_gpu_batches == 1:
        return overlap_single_batch.name
    return overlap_cpu_attention.name if host_attends else overlap_multi_batch.name
