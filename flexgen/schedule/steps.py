"""Schedules as data: steps, and what each step needs.

A schedule visits a grid of cells (token i, layer j, batch k). The literature calls it the block schedule
(FlexGen, arXiv 2303.06865, section 4.1, algorithm 1). Two functions define it. An *order* (`orders.py`) yields every
`Step` of a `Grid` once. `needs` returns the steps that must be done before a step may start, including those that use
the same buffers. `check` proves an order, the executor runs it, and the simulator times it; none of them depends on
how the order was generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple

from flexgen.errors import ScheduleError
from flexgen.schedule.turns import Turns


class Op(Enum):
    """The operation that a step performs for its cell."""

    LOAD_WEIGHTS = auto()  # one piece of a layer's weights, from its home into a slot
    LOAD_CACHE = auto()  # the KV cache of earlier tokens, to the place where attention runs
    LOAD_HIDDEN = auto()  # token ids (first layer) or hidden states, into a slot
    PROJECT = auto()  # queries, keys and values; those of rows with host attention are copied to the host
    ATTEND = auto()  # attention: the host's rows on the host, the device's on the device
    LOAD_ATTENTION = auto()  # the host's attention output, to the device
    COMPUTE = auto()  # the layer, or the rest of it after PROJECT, ATTEND and LOAD_ATTENTION
    STORE_HIDDEN = auto()  # hidden states to their home, or the new ids (last layer)
    STORE_CACHE = auto()  # keys and values of new tokens, to their home

    # Enum hashes the name in Python code; hashing the identity is enough, and keeps steps cheap.
    __hash__ = object.__hash__


_WHOLE = (Op.COMPUTE,)
_IN_HALVES = Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENTION, Op.COMPUTE


class Step(NamedTuple):
    """One operation of cell (token, layer, batch). For LOAD_WEIGHTS, `batch` is the number of the piece."""

    op: Op
    token: int
    layer: int
    batch: int = 0


class Cell(NamedTuple):
    token: int
    layer: int
    batch: int


@dataclass(frozen=True)
class Grid:
    """The cells of one block, and the number of buffers they share.

    weight_pieces: the pieces in which the weights of a layer are loaded. Short transfers do not wait behind one
        long transfer.
    weight_slots: the layers whose weights may be in flight at once (see `Turns`).
    cell_slots: the cells whose inputs and outputs may be in flight at once.
    splits_attention: cells have the steps PROJECT, ATTEND and LOAD_ATTENTION, so that attention on the host overlaps
        with the computation on the device.
    feeds_ids: the next token takes the ids from the compute device, and does not wait until the host has them.
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
        """Every cell: tokens outermost, batches innermost, so that all batches use a layer's weights in turn."""
        return (
            Cell(i, j, k) for i in range(self.tokens) for j in range(self.layers) for k in range(self.batches)
        )

    @cached_property
    def turns(self) -> Turns:
        """The assignment of weight slots to visits."""
        return Turns(self.layers, self.weight_slots)

    @property
    def computing(self) -> tuple[Op, ...]:
        """The steps that compute a cell, in order."""
        return _IN_HALVES if self.splits_attention else _WHOLE

    def cell(self, n: int) -> Cell | None:
        """Number `n` of `cells`, or None outside the grid."""
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
        """Whether the cell's output is stored by batch, not by cell slot: new ids that the next token takes."""
        return self.feeds_ids and cell.layer == self.layers - 1

    def cell_slot(self, token: int, layer: int, batch: int) -> int:
        return ((token * self.layers + layer) * self.batches + batch) % self.cell_slots


LOADS = Op.LOAD_CACHE, Op.LOAD_HIDDEN
STORES = Op.STORE_HIDDEN, Op.STORE_CACHE


def needs(step: Step, grid: Grid) -> list[Step]:
    """Steps that must be done before `step` may start: the sources of its data and the last users of its buffers."""
    visit = needed_visit(step, grid)
    return [*(visit.steps(grid) if visit else ()), *needed_steps(step, grid)]


class Visit(NamedTuple):
    """All steps of one op in one visit of a layer: every piece of its weights, or every batch."""

    op: Op
    token: int
    layer: int

    def steps(self, grid: Grid) -> list[Step]:
        count = grid.weight_pieces if self.op is Op.LOAD_WEIGHTS else grid.batches
        return [Step(*self, n) for n in range(count)]


def needed_visit(step: Step, grid: Grid) -> Visit | None:
    """The visit that a step needs as a whole. It is separate from `needed_steps` because it has many steps."""
    op, i, j, _ = step
    if op is Op.LOAD_WEIGHTS:  # the slot is free when the previous layer in it has computed every batch
        before = grid.turns.before(i, j)
        return Visit(Op.COMPUTE, *before) if before else None
    return Visit(Op.LOAD_WEIGHTS, i, j) if op is grid.computing[0] else None


def needed_steps(step: Step, grid: Grid) -> list[Step]:
    """The other steps that a step needs."""
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
            if old := grid.cell_after(
                Cell(i, j, k), -grid.cell_slots
            ):  # the buffers between PROJECT and COMPUTE
                needed.append(Step(Op.COMPUTE, *old))
            return needed
        case Op.ATTEND:
            return [Step(Op.PROJECT, i, j, k), Step(Op.LOAD_CACHE, i, j, k)]
        case Op.LOAD_ATTENTION:
            return [Step(Op.ATTEND, i, j, k)]
        case Op.COMPUTE:
            # With split attention, PROJECT has waited for the input and the weights.
            data = (Op.LOAD_ATTENTION,) if grid.splits_attention else LOADS
            needed = [Step(op, i, j, k) for op in data]
            if old := grid.cell_after(Cell(i, j, k), -grid.cell_slots):  # the output buffers
                needed += [Step(op, *old) for op in STORES if not (op is Op.STORE_HIDDEN and grid.keeps(old))]
            if grid.keeps(Cell(i, j, k)) and i:
                needed.append(Step(Op.STORE_HIDDEN, i - 1, j, k))
            return needed
        case Op.STORE_HIDDEN | Op.STORE_CACHE:
            return [Step(Op.COMPUTE, i, j, k)]


def all_steps(grid: Grid) -> Iterator[Step]:
    """Every step of the grid, in no particular order."""
    for i, j, k in grid.cells():
        if k == 0:
            yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
        yield from (Step(op, i, j, k) for op in (*LOADS, *grid.computing, *STORES))


def check(steps: Iterable[Step], grid: Grid) -> None:
    """Prove that an order is legal and complete, or raise ScheduleError.

    Legal: each step is issued once, after all the steps that it needs. Lanes serve their queues in the order of
    issue, so a legal order cannot deadlock. Complete: no step of the grid is missing.
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
