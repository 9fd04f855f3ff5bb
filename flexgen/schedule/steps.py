"""Schedules as data: steps, and what each step needs.

A schedule walks a grid of cells (token i, layer j, batch k); the literature calls it the block
schedule (FlexGen, arXiv 2303.06865, section 4.1, algorithm 1). Everything else follows from two
functions: an *order* (`orders.py`) yields every `Step` of a `Grid` once, and `needs` tells what must be done
before a step may start, the reuse of buffers included. `check` proves an order, the executor runs it, the
simulator times it; none of them knows how the order was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from flexgen.errors import ScheduleError
from flexgen.schedule.turns import Turns


class Op(Enum):
    """What a step does for its cell."""

    LOAD_WEIGHTS = auto()  # one piece of a layer's weights, from their home into a slot
    LOAD_CACHE = auto()  # the KV cache of earlier tokens, to where attention reads it
    LOAD_HIDDEN = auto()  # token ids (first layer) or hidden states, into a slot
    PROJECT = auto()  # queries, keys and values; those of rows that the host attends leave the device
    ATTEND = auto()  # attention: the host's rows on the host, the device's on the device
    LOAD_ATTENDED = auto()  # the host's attention, to the device
    COMPUTE = auto()  # the layer, or what the three steps before it have left of it
    STORE_HIDDEN = auto()  # hidden states to their home, or the new ids (last layer)
    STORE_CACHE = auto()  # keys and values of the new tokens, to their home

    # An Enum hashes by name through Python code; identity is enough and keeps a step cheap.
    __hash__ = object.__hash__


_WHOLE = (Op.COMPUTE,)
_IN_HALVES = Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENDED, Op.COMPUTE


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
    up the short ones that queue behind it. `weight_slots` and `cell_slots`: how many layers' weights (see
    `Turns`), and how many cells' inputs and outputs, may be on their way at once. `splits_attention`: a cell
    has the steps PROJECT, ATTEND and LOAD_ATTENDED, so that the host computes attention
    while the device computes other cells. `feeds_ids`: the next token takes the ids on the compute device, and does
    not wait until the host has them.
    """

    tokens: int
    layers: int
    batches: int
    weight_pieces: int = 1
    weight_slots: int = 2
    cell_slots: int = 2
    splits_attention: bool = False
    feeds_ids: bool = False

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__.keys() - {"splits_attention", "feeds_ids"}:
            if getattr(self, name) < 1:
                raise ScheduleError(f"a grid needs {name} >= 1, not {getattr(self, name)}")

    def cells(self) -> Iterator[Cell]:
        """Every cell: tokens outermost, batches innermost, so that a layer's weights serve all batches."""
        return (
            Cell(i, j, k) for i in range(self.tokens) for j in range(self.layers) for k in range(self.batches)
        )

    @property
    def turns(self) -> Turns:
        """Which of the weight slots serves a visit."""
        return Turns(self.layers, self.weight_slots)

    @property
    def computing(self) -> tuple[Op, ...]:
        """The steps that compute a cell, in order."""
        return _IN_HALVES if self.splits_attention else _WHOLE

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

    def keeps(self, cell: Cell) -> bool:
        """Whether what the cell computes is kept by batch, not by cell slot: new ids that the next token takes."""
        return self.feeds_ids and cell.layer == self.layers - 1

    def cell_slot(self, token: int, layer: int, batch: int) -> int:
        return ((token * self.layers + layer) * self.batches + batch) % self.cell_slots


LOADS = Op.LOAD_CACHE, Op.LOAD_HIDDEN
STORES = Op.STORE_HIDDEN, Op.STORE_CACHE


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
    """All steps of a visit that a step needs, if any. They are one value, because they are many."""
    op, i, j, _ = step
    if op is Op.LOAD_WEIGHTS:  # the slot is free once the layer that had it has computed every batch
        before = grid.turns.before(i, j)
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
            made = Op.COMPUTE if grid.feeds_ids and j == 0 else Op.STORE_HIDDEN
            needed = [Step(made, *before, k)] if before else []
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
            data = (Op.LOAD_ATTENDED,) if grid.splits_attention else LOADS
            needed = [Step(op, i, j, k) for op in data]
            if old := grid.cell_after(Cell(i, j, k), -grid.cell_slots):  # the output buffers
                needed += [Step(op, *old) for op in STORES if not (op is Op.STORE_HIDDEN and grid.keeps(old))]
            if grid.keeps(Cell(i, j, k)) and i:
                needed.append(Step(Op.STORE_HIDDEN, i - 1, j, k))
            return needed
        case Op.STORE_HIDDEN | Op.STORE_CACHE:
            return [Step(Op.COMPUTE, i, j, k)]


def all_steps(grid: Grid) -> Iterator[Step]:
    """Every step of the grid, in no useful order."""
    for i, j, k in grid.cells():
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        yield from (Step(op, i, j, k) for op in (*LOADS, *grid.computing, *STORES))


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
