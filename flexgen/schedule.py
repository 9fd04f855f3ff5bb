"""Schedules as data: the order of steps, and what each step needs.

A schedule walks a grid of cells (token i, layer j, batch k); the literature calls it the block
schedule (FlexGen, arXiv 2303.06865, section 4.1, algorithm 1). Everything else follows from two
functions: an *order* yields every `Step` of a `Grid` once, and `needs` tells what must be done before a
step may start, the reuse of buffers included. `check` proves an order, the executor runs it, the
simulator times it; none of them knows how the order was made.

To add an order, write one generator and decorate it with `@order()`:

    @order()
    def my_order(grid): ...

It can then be asked for by name (`OptLM(..., order="my_order")`, `--order my_order`). How many buffers it
wants, and whether it takes the layers that attend apart, are arguments of the decorator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from flexgen.errors import ScheduleError


class Op(Enum):
    """What a step does for its cell."""

    LOAD_WEIGHTS = auto()  # one piece of a layer's weights, from their home into a slot
    LOAD_CACHE = auto()  # the KV cache of earlier tokens, to where it is attended
    LOAD_HIDDEN = auto()  # token ids (first layer) or hidden states, into a slot
    PROJECT = auto()  # queries, keys and values; those of rows that the host attends leave the device
    ATTEND = auto()  # attention: the host's rows on the host, the device's on the device
    LOAD_ATTENDED = auto()  # what the host has attended, to the device
    COMPUTE = auto()  # the layer, or what the three steps before it have left of it
    STORE_HIDDEN = auto()  # hidden states to their home, or the new ids (last layer)
    STORE_CACHE = auto()  # keys and values of the new tokens, to their home

    # An Enum hashes by name through Python code; identity is enough and keeps a step cheap.
    __hash__ = object.__hash__


class Step(NamedTuple):
    """One operation of cell (token, layer, batch). For LOAD_WEIGHTS `batch` is the piece's number."""

    op: Op
    token: int
    layer: int
    batch: int = 0


class Cell(NamedTuple):
    token: int
    layer: int
    batch: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of one block, and how many buffers they share.

    `weight_pieces`: a layer's weights travel in that many pieces, so that a long transfer does not hold
    up the short ones that queue behind it. `weight_slots` and `cell_slots`: how many layers' weights, and
    how many cells' inputs and outputs, may be on their way at once. `splits_attention`: a cell has the steps
    PROJECT, ATTEND and LOAD_ATTENDED, for whose sake the host attends beside the computation.
    """

    tokens: int
    layers: int
    batches: int
    weight_pieces: int = 1
    weight_slots: int = 2
    cell_slots: int = 2
    splits_attention: bool = False

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__.keys() - {"splits_attention"}:
            if getattr(self, name) < 1:
                raise ScheduleError(f"a grid needs {name} >= 1, not {getattr(self, name)}")

    def cells(self) -> Iterator[Cell]:
        """Every cell: tokens outermost, batches innermost, so that a layer's weights serve all batches."""
        return (
            Cell(i, j, k) for i in range(self.tokens) for j in range(self.layers) for k in range(self.batches)
        )

    @property
    def computing(self) -> tuple[Op, ...]:
        """The steps that compute a cell, in order."""
        if self.splits_attention:
            return Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENDED, Op.COMPUTE
        return (Op.COMPUTE,)

    def cell(self, n: int) -> Cell | None:
        """Cell number `n` of that sequence, or None outside the grid."""
        if not 0 <= n < self.tokens * self.layers * self.batches:
            return None
        visit, batch = divmod(n, self.batches)
        return Cell(*divmod(visit, self.layers), batch)

    def cell_after(self, cell: Cell, distance: int) -> Cell | None:
        """The cell `distance` places later (earlier if negative) in that sequence, or None outside."""
        return self.cell((cell.token * self.layers + cell.layer) * self.batches + cell.batch + distance)

    def visit(self, token: int, layer: int, distance: int = 0) -> tuple[int, int] | None:
        """(token, layer) of the layer visit `distance` visits later, or None outside the grid."""
        n = token * self.layers + layer + distance
        return divmod(n, self.layers) if 0 <= n < self.tokens * self.layers else None

    def cell_slot(self, token: int, layer: int, batch: int) -> int:
        return ((token * self.layers + layer) * self.batches + batch) % self.cell_slots

    def pieces_beside(self, batch: int) -> range:
        """The pieces of the next layer's weights to issue beside `batch`: spread evenly, earliest first."""
        first, last = (-(-k * self.weight_pieces // self.batches) for k in (batch, batch + 1))
        return range(first, last)


_LOADS = Op.LOAD_CACHE, Op.LOAD_HIDDEN
_STORES = Op.STORE_HIDDEN, Op.STORE_CACHE


def needs(step: Step, grid: Grid) -> list[Step]:
    """Steps that must be done before `step` may start: its data, and the last user of its buffers."""
    visit = needed_visit(step, grid)
    return [*(visit.steps(grid) if visit else ()), *needed_steps(step, grid)]


class Visit(NamedTuple):
    """All steps of an op in one visit of a layer: every piece of its weights, or every batch."""

    op: Op
    token: int
    layer: int

    def steps(self, grid: Grid) -> list[Step]:
        count = grid.weight_pieces if self.op is Op.LOAD_WEIGHTS else grid.batches
        return [Step(*self, n) for n in range(count)]


def needed_visit(step: Step, grid: Grid) -> Visit | None:
    """What a step needs as a whole, together with others: told apart because it is so many steps."""
    op, i, j, _ = step
    if op is Op.LOAD_WEIGHTS:  # the slot is free once the layer that had it has computed every batch
        before = grid.visit(i, j, -grid.weight_slots)
        return Visit(Op.COMPUTE, *before) if before else None
    return Visit(Op.LOAD_WEIGHTS, i, j) if op is grid.computing[0] else None


def needed_steps(step: Step, grid: Grid) -> list[Step]:
    """What else it needs."""
    op, i, j, k = step
    match op:
        case Op.LOAD_WEIGHTS:
            return []
        case Op.LOAD_CACHE:
            needed = [Step(Op.STORE_CACHE, i - 1, j, k)] if i else []
            if old := grid.cell_after(Cell(i, j, k), -grid.cell_slots):  # new keys are stored from the slot
                needed += [Step(Op.COMPUTE, *old), Step(Op.STORE_CACHE, *old)]
            return needed
        case Op.LOAD_HIDDEN:
            before = grid.visit(i, j, -1)
            needed = [Step(Op.STORE_HIDDEN, *before, k)] if before else []
            if old := grid.cell_after(Cell(i, j, k), -grid.cell_slots):
                needed.append(Step(Op.COMPUTE, *old))
            return needed
        case Op.PROJECT:
            needed = [Step(Op.LOAD_HIDDEN, i, j, k)]
            if old := grid.cell_after(Cell(i, j, k), -grid.cell_slots):  # what passes from half to half
                needed.append(Step(Op.COMPUTE, *old))
            return needed
        case Op.ATTEND:
            return [Step(Op.PROJECT, i, j, k), Step(Op.LOAD_CACHE, i, j, k)]
        case Op.LOAD_ATTENDED:
            return [Step(Op.ATTEND, i, j, k)]
        case Op.COMPUTE:
            # With halves, its input and weights were there before PROJECT.
            data = (Op.LOAD_ATTENDED,) if grid.splits_attention else _LOADS
            needed = [Step(op, i, j, k) for op in data]
            if old := grid.cell_after(Cell(i, j, k), -grid.cell_slots):  # the output buffers
                needed += [Step(Op.STORE_HIDDEN, *old), Step(Op.STORE_CACHE, *old)]
            return needed
        case Op.STORE_HIDDEN | Op.STORE_CACHE:
            return [Step(Op.COMPUTE, i, j, k)]


def all_steps(grid: Grid) -> Iterator[Step]:
    """Every step of the grid, in no useful order."""
    for i, j, k in grid.cells():
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        yield from (Step(op, i, j, k) for op in (*_LOADS, *grid.computing, *_STORES))


def check(steps: Iterable[Step], grid: Grid) -> None:
    """Prove that an order is legal and complete, or raise ScheduleError.

    Legal: each step once, and after all that it needs. Because lanes serve their queues in the order of
    issue, a legal order cannot deadlock. Complete: no step of the grid is missing.
    """
    expected = set(all_steps(grid))
    done: set[Step] = set()
    for n, step in enumerate(steps):
        if step not in expected:
            raise ScheduleError(f"step {n} {step} is outside {grid}")
        if step in done:
            raise ScheduleError(f"step {n} {step} is issued twice")
        if late := [other for other in needs(step, grid) if other not in done]:
            raise ScheduleError(f"step {n} {step} is issued before {late[0]}, which it needs")
        done.add(step)
    if missing := expected - done:
        raise ScheduleError(f"{len(missing)} steps are never issued, one is {min(missing, key=str)}")


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


@dataclass(frozen=True)
class Order:
    """A generator of the steps of a grid, the slots that its grid is to have, and whether its cells are to
    attend in steps of their own. `for_comparison`: it imitates another engine, and no search chooses it."""

    name: str
    generate: Callable[[Grid], Iterator[Step]]
    slots: Slots
    splits_attention: bool
    for_comparison: bool = False

    def __call__(self, grid: Grid) -> Iterator[Step]:
        return self.generate(grid)

    def grid(
        self, tokens: int, layers: int, batches: int, weight_pieces: int, slots: Slots | None = None
    ) -> Grid:
        """The grid that the order runs on; with `slots` where those of another order are there already."""
        slots = slots or self.slots
        shape = tokens, layers, batches, weight_pieces, slots.weights, slots.cells
        return Grid(*shape, self.splits_attention)


ORDERS: dict[str, Order] = {}


def order(
    *, slots: Slots = Slots(), splits_attention: bool = False, for_comparison: bool = False
) -> Callable[[Callable[[Grid], Iterator[Step]]], Order]:
    """Register a generator as an order under its own name."""

    def register(generate: Callable[[Grid], Iterator[Step]]) -> Order:
        made = Order(generate.__name__, generate, slots, splits_attention, for_comparison)
        ORDERS[made.name] = made
        return made

    return register


@order(slots=Slots(weights=1, cells=1))
def normal(grid: Grid) -> Iterator[Step]:
    """No overlap: everything a cell needs is fetched right before it computes."""
    for i, j, k in grid.cells():
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        yield from (Step(op, i, j, k) for op in (*_LOADS, *grid.computing, *_STORES))


@order()
def overlap_single_batch(grid: Grid) -> Iterator[Step]:
    """While a layer computes, the next layer's weights and the next cell's cache arrive.

    Hidden states go straight from one layer to the next: with one batch there is nothing to hide them
    behind.
    """
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    for cell in grid.cells():
        i, j, k = cell
        if next_visit := grid.visit(i, j, 1):
            yield from (Step(Op.LOAD_WEIGHTS, *next_visit, piece) for piece in grid.pieces_beside(k))
        following = grid.cell_after(cell, 1)
        # With one layer and one batch the next cell reads what this one stores: it cannot come early.
        early = following is not None and following[1:] != cell[1:]
        if following and early:
            yield Step(Op.LOAD_CACHE, *following)
        yield from (Step(op, i, j, k) for op in (Op.LOAD_HIDDEN, *grid.computing, *_STORES))
        if following and not early:
            yield Step(Op.LOAD_CACHE, *following)


@order()
def overlap_multi_batch(grid: Grid) -> Iterator[Step]:
    """While a batch computes, the next batch's cache and hidden states arrive, the previous one's leave,
    and the next layer's weights come in pieces beside each batch (algorithm 1 of the paper)."""
    if grid.batches == 1:  # the next cell's hidden states are this cell's output: nothing to overlap
        yield from overlap_single_batch(grid)
        return
    yield from (Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces))
    yield Step(Op.LOAD_CACHE, 0, 0, 0)
    yield Step(Op.LOAD_HIDDEN, 0, 0, 0)
    for cell in grid.cells():
        i, j, k = cell
        if next_visit := grid.visit(i, j, 1):
            yield from (Step(Op.LOAD_WEIGHTS, *next_visit, piece) for piece in grid.pieces_beside(k))
        if following := grid.cell_after(cell, 1):
            yield Step(Op.LOAD_CACHE, *following)
            yield Step(Op.LOAD_HIDDEN, *following)
        yield from (Step(op, i, j, k) for op in (*grid.computing, *_STORES))


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
    yield from (Step(op, *cell) for n in range(ahead) if (cell := grid.cell(n)) for op in _LOADS)
    beside = 0  # the cell beside which the next weights are issued
    for n in range(grid.tokens * grid.layers * grid.batches + lag):
        if following := grid.cell(n + ahead):
            yield from (Step(op, *following) for op in _LOADS)
        cell, before, oldest = grid.cell(n), grid.cell(n - 1), grid.cell(n - lag)
        rest = [Step(op, *oldest) for op in (Op.COMPUTE, *_STORES)] if oldest else []
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
                yield from (Step(Op.LOAD_WEIGHTS, *next_visit, piece) for piece in grid.pieces_beside(batch))
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
        yield from (Step(op, i, j, k) for op in (*grid.computing, *_STORES))
        if following and not cache_early:
            yield Step(Op.LOAD_CACHE, *following)


def order_for(overlap: bool, num_gpu_batches: int, host_attends: bool = False) -> str:
    """The name of the order that a policy asks for. `host_attends`: to rows of a device with its own memory."""
    if not overlap:
        return "normal"
    if num_gpu_batches == 1:
        return "overlap_single_batch"
    return "overlap_cpu_attention" if host_attends else "overlap_multi_batch"
