"""The orders of steps that are there to choose from.

To add one, write a generator and decorate it with `@order()`:

    @order()
    def my_order(grid): ...

It can then be asked for by name: `OptLM(..., order="my_order")`, and where it stands in this file
`--order my_order`. How many buffers it wants, and whether it takes the layers that attend apart, are arguments of the
decorator. What makes an order legal is said by `schedule.needs`, and proved by `schedule.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product

from flexgen.errors import ScheduleError, did_you_mean, shown
from flexgen.schedule.steps import LOADS, STORES, Grid, Op, Step, check


@dataclass(frozen=True)
class Slots:
    """How many buffers of each kind are kept: of whole layers' weights, of cells' inputs and outputs, and of
    layers' decoded weights, as many as there are layers that are computed by turns.

    With one slot nothing can be fetched before what it replaces has been used, so an order that wants no
    overlap asks for one: lanes run ahead of the computation as far as the slots let them.
    """

    weights: int = 2
    cells: int = 2
    decoded: int = 1

    def fit(self, held: Slots) -> bool:
        """Whether `held` has at least as many of each kind."""
        return all(getattr(self, f.name) <= getattr(held, f.name) for f in fields(self))


@dataclass(frozen=True)
class Order:
    """A generator of the steps of a grid, the slots that its grid is to have, and whether its cells are to
    attend in steps of their own. `serial`: each step waits for the one before it, so that nothing overlaps.
    `for_comparison`: it imitates another engine, and no search chooses it."""

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
        """The grid that the order runs on; with `slots` where those of another order are there already."""
        slots = slots or self.slots
        shape = tokens, layers, batches, weight_pieces, slots.weights, slots.cells
        # What is serial has the host know the ids before the next token begins.
        return Grid(*shape, self.splits_attention, feeds_ids and not self.serial)


ORDERS: dict[str, Order] = {}


def order(
    *,
    slots: Slots = Slots(),
    splits_attention: bool = False,
    serial: bool = False,
    for_comparison: bool = False,
) -> Callable[[Callable[[Grid], Iterator[Step]]], Order]:
    """Register a generator as an order under its own name."""

    def register(generate: Callable[[Grid], Iterator[Step]]) -> Order:
        made = Order(generate.__name__, generate, slots, splits_attention, serial, for_comparison)
        ORDERS[made.name] = made
        return made

    return register


def weights_beside(grid: Grid) -> Iterator[list[Step]]:
    """For each cell the weights to issue beside it: those for which a slot is free, spread over the batches."""
    for visits in grid.turns.arrivals(grid.tokens):
        visit_of = (divmod(number, grid.layers) for number in visits)
        steps = [Step(Op.LOAD_WEIGHTS, *visit, n) for visit in visit_of for n in range(grid.weight_pieces)]
        yield from _spread(steps, grid.batches)


def _spread(steps: list[Step], batches: int) -> list[list[Step]]:
    """Which of them to issue beside each batch: as many beside one as beside the other, earliest first."""
    ends = [-(-k * len(steps) // batches) for k in range(batches + 1)]
    return [steps[first:last] for first, last in pairwise(ends)]


@order(slots=Slots(weights=1, cells=1), serial=True)
def normal(grid: Grid) -> Iterator[Step]:
    """No overlap: everything a cell needs is fetched right before it computes."""
    for i, j, k in grid.cells():
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        yield from (Step(op, i, j, k) for op in (*LOADS, *grid.computing, *STORES))


@order()
def overlap_single_batch(grid: Grid) -> Iterator[Step]:
    """While a layer computes, the next weights for which there is a slot and the next cell's cache arrive.

    Hidden states go straight from one layer to the next: with one batch there is nothing to hide them
    behind.
    """
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    for cell, arriving in zip(grid.cells(), weights_beside(grid), strict=True):
        i, j, k = cell
        yield Step(Op.LOAD_HIDDEN, i, j, k)  # first: of a table on the disk they come on the same lane
        yield from arriving
        following = grid.cell_after(cell, 1)
        # With one layer and one batch the next cell reads what this one stores: it cannot come early.
        early = following is not None and following[1:] != cell[1:]
        if following and early:
            yield Step(Op.LOAD_CACHE, *following)
        yield from (Step(op, i, j, k) for op in (*grid.computing, *STORES))
        if following and not early:
            yield Step(Op.LOAD_CACHE, *following)


@order()
def overlap_multi_batch(grid: Grid) -> Iterator[Step]:
    """While a batch computes, the next batch's cache and hidden states arrive, the previous one's leave,
    and the next weights come in pieces beside each batch (algorithm 1 of the paper)."""
    if grid.batches == 1:  # the next cell's hidden states are this cell's output: nothing to overlap
        yield from overlap_single_batch(grid)
        return
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    yield Step(Op.LOAD_HIDDEN, 0, 0, 0)
    for cell, arriving in zip(grid.cells(), weights_beside(grid), strict=True):
        yield from arriving
        if following := grid.cell_after(cell, 1):
            yield Step(Op.LOAD_CACHE, *following)
            yield Step(Op.LOAD_HIDDEN, *following)
        yield from (Step(op, *cell) for op in (*grid.computing, *STORES))


@order(slots=Slots(weights=3, cells=4, decoded=2), splits_attention=True)
def overlap_cpu_attention(grid: Grid) -> Iterator[Step]:
    """While the host attends to a batch, the device projects the next one and computes what is left of the
    one before, and the next layer's weights arrive (as in MoE-Lightning, arXiv 2411.11217).

    Wants whole layers (`sep_layer = false`): beside an MLP that is a unit of its own nothing is attended.
    """
    if grid.batches == 1:  # the next cell's hidden states are this cell's output: nothing to overlap
        yield from overlap_single_batch(grid)
        return
    in_hand = min(grid.batches, grid.cell_slots)
    # COMPUTE is issued right after its answer, or, with cells enough, behind the next PROJECT: then neither
    # the device nor the host waits while queries and answers cross the link.
    lag = 2 if in_hand > 3 else 1
    ahead = 1 if in_hand > lag + 1 else 0  # how far a cell's loads are ahead of it
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield from (Step(op, *cell) for n in range(ahead) if (cell := grid.cell(n)) for op in LOADS)
    beside = 0  # the cell beside which the next weights are issued
    for n in range(grid.tokens * grid.layers * grid.batches + lag):
        if following := grid.cell(n + ahead):
            yield from (Step(op, *following) for op in LOADS)
        cell, before, oldest = grid.cell(n), grid.cell(n - 1), grid.cell(n - lag)
        rest = [Step(op, *oldest) for op in (Op.COMPUTE, *STORES)] if oldest else []
        if cell and grid.splits_attention:
            yield Step(Op.PROJECT, *cell)
        if lag > 1:
            yield from rest
        if cell and grid.splits_attention:
            yield Step(Op.ATTEND, *cell)
        if before and grid.splits_attention:
            yield Step(Op.LOAD_ATTENDED, *before)
        # Weights come behind the short transfers, and early, so that the first PROJECT of a layer does not wait
        # for the last of them; but no earlier than the layer whose slot they take has computed every batch.
        while beside <= n + 1 and (beside // grid.batches + 2 - grid.weight_slots) * grid.batches + lag <= n:
            visit, batch = divmod(beside, grid.batches)
            if next_visit := grid.visit(0, 0, visit + 1):
                weights = [Step(Op.LOAD_WEIGHTS, *next_visit, piece) for piece in range(grid.weight_pieces)]
                yield from _spread(weights, grid.batches)[batch]
            beside += 1
        if lag == 1:
            yield from rest


@order(slots=Slots(weights=1), for_comparison=True)
def flexgen(grid: Grid) -> Iterator[Step]:
    """What FlexGen does by its published cost model, for comparison: a layer's weights, all of them beside the
    first batch, add to its time, and only what belongs to a cell overlaps.

    FlexGen waits for the whole device after every cell and attends on the CPU in its main thread. Its cost model
    says so: while decoding, weight loading + the longest of cache, hidden states and computation.
    """
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    for cell in grid.cells():
        i, j, k = cell
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        # The next cell's hidden states come early, unless they are what this cell stores.
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


def check_order(name: str) -> None:
    """Raise ScheduleError for an order that is not known, or that is not legal and complete.

    It runs on small grids of every kind: a run that follows it could fail far into its work.
    """
    if not isinstance(name, str) or name not in ORDERS:
        known = ", ".join(sorted(ORDERS))
        raise ScheduleError(f"order {shown(name)} is not known; known: {known}{did_you_mean(name, ORDERS)}")
    for tokens, layers, batches, pieces in product((1, 3), (1, 2, 5), (1, 2, 5), (1, 2)):
        grid = ORDERS[name].grid(tokens, layers, batches, pieces)
        try:
            check(ORDERS[name](grid), grid)
            if grid.splits_attention:  # where the host attends to nothing its grid does not
                whole = replace(grid, splits_attention=False)
                check(ORDERS[name](whole), whole)
        except ScheduleError as error:
            shape = f"{tokens} tokens, {layers} layers, {batches} batches and {pieces} pieces of weights"
            raise ScheduleError(f"order {shown(name)} with {shape}: {error}") from None


def order_for(overlap: bool, num_gpu_batches: int, host_attends: bool = False) -> str:
    """The name of the order that a policy asks for. `host_attends`: to rows of a device with its own memory."""
    if not overlap:
        return normal.name
    if num_gpu_batches == 1:
        return overlap_single_batch.name
    return overlap_cpu_attention.name if host_attends else overlap_multi_batch.name
