"""The needs of a run that leaves out its idle steps.

If data is used where it is stored, most steps of a schedule have no work in any pass. Such a step is *idle*. A run
does not issue it, and the steps that need it wait for its own needs instead. A computation is idle if that of an
earlier batch includes it, or for the first batch that of an earlier layer; steps that need it wait for the latter.
Its loads and stores must be idle too, because the earlier computation does not wait for them. The needs of a step are
the same in each pass, except for the first passes, so they are computed once and kept for later runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from flexgen.schedule.steps import STORES, Grid, Op, Step, needs

_KEPT = 16
"""The number of grids whose needs are kept. While prompts enter in cells of their own, almost every run has another
number of cells than the one before. To compute the needs again takes milliseconds of a pass."""


class Place(NamedTuple):
    """A step in every pass: its op, its layer, and its batch (or piece)."""

    op: Op
    layer: int
    batch: int


class _Needed(NamedTuple):
    """A step that is needed, `back` passes before the step that needs it."""

    op: Op
    back: int
    layer: int
    batch: int


class BusySteps:
    """The steps of a grid without the idle ones."""

    def __init__(self, grid: Grid, idle: frozenset[Place]) -> None:
        self._idle = idle
        # From this pass on, every slot has been used before.
        self._steady = max(grid.weight_slots, grid.cell_slots) + 1
        self._grid = replace(grid, tokens=self._steady + 1)
        self._needed: dict[Place, tuple[_Needed, ...]] = {}
        stores = [Place(Op.STORE_HIDDEN, grid.layers - 1, k) for k in range(grid.batches)]
        stores += [Place(Op.STORE_CACHE, j, k) for j in range(grid.layers) for k in range(grid.batches)]
        self._stores = [place for place in stores if place not in idle]

    def needs(self, step: Step) -> Sequence[Step]:
        """`schedule.needs` of a step that is not idle, with the needs of idle steps in place of these."""
        op, token, layer, batch = step
        return [
            Step(other, token - back, j, k)
            for other, back, j, k in self._needs_of(Place(op, layer, batch))
            if back <= token
        ]

    def stores(self, token: int) -> Sequence[Step]:
        """The steps that store the results of a pass: new ids, keys and values."""
        return [Step(op, token, layer, batch) for op, layer, batch in self._stores]

    def _needs_of(self, place: Place) -> tuple[_Needed, ...]:
        needed = self._needed.get(place)
        if needed is None:
            found: dict[_Needed, None] = {}
            for other in self._all_needs(place):
                back, behind = self._steady - other.token, self._including(other)
                if behind not in self._idle:
                    found[_Needed(behind.op, back, behind.layer, behind.batch)] = None
                elif other.op is not Op.LOAD_WEIGHTS:  # weights in place need no slot, so no earlier layer
                    for n in self._needs_of(behind):
                        found[n._replace(back=back + n.back)] = None
            if place.op is Op.COMPUTE and place not in self._idle:
                found = {n: None for n in found if not self._follows(n, place)}
            needed = self._needed[place] = tuple(found)
        return needed

    def _all_needs(self, place: Place) -> Iterator[Step]:
        """The needs of a step in a pass in which all slots have been used, and for a computation, those of the other
        batches that it includes."""
        op, layer, batch = place
        yield from needs(Step(op, self._steady, layer, batch), self._grid)
        if op is Op.COMPUTE and place not in self._idle:
            while (place := Place(op, layer, batch := batch + 1)) in self._idle:
                yield from needs(Step(op, self._steady, layer, batch), self._grid)

    def _follows(self, needed: _Needed, place: Place) -> bool:
        """Whether a step of the same pass is the computation at `place`, or stores its results. A computation of
        several batches has a result for each of them, so they do not wait for each other."""
        op, back, layer, batch = needed
        if back or op not in (Op.COMPUTE, *STORES):
            return False
        return self._including(Step(Op.COMPUTE, 0, layer, batch)) == place

    def _including(self, step: Step) -> Place:
        """The step, or the computation that includes it."""
        place = Place(step.op, step.layer, step.batch)
        while place.op is Op.COMPUTE and place in self._idle:
            op, layer, batch = place
            place = Place(op, layer, batch - 1) if batch else Place(op, layer - 1, batch)
        return place


def busy_steps(grid: Grid, idle: frozenset[Place]) -> BusySteps:
    """The steps of the grid that are not idle, for any number of passes."""
    return _kept(replace(grid, tokens=1), idle)


_kept = lru_cache(maxsize=_KEPT)(BusySteps)
