"""Schedules as the simulator reads them: each step with how far before it those stand that it needs.

An order does the same in every visit of a layer, but for the first visits and the last. So a few visits are
numbered, and the schedule of a deep model or of many tokens is put together from their sections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from flexgen.schedule import ORDERS, Grid, Op, Step, Visit, needed_steps, needed_visit

_TOKENS = 5
"""Tokens after which nothing new comes: the first two begin, the last one ends, and those between are alike."""
_AHEAD = 2
"""Visits that an order issues steps ahead of the computation, or has them left behind it, at most."""

Entry = tuple[Op | None, int, int]
"""A step: its op, its visit counted from that of its section, and its batch or piece. None in place of an op stands
for no step, but for all that it needs: many steps wait for the same many."""


class Section(NamedTuple):
    """What is issued from the first computation of a visit to that of the next one."""

    entries: tuple[Entry, ...]
    needs: tuple[tuple[int, ...], ...]
    """For each entry those that must be done before it: -1 is the entry right before it."""


@dataclass(frozen=True, eq=False)
class Numbered:
    """The steps of a schedule in their order: a section for each visit of a layer, the same one for those alike."""

    sections: Sequence[Section]
    layers: int

    def steps(self) -> Iterator[Step | None]:
        """What its entries stand for."""
        for visit, section in enumerate(self.sections):
            for op, ahead, number in section.entries:
                yield None if op is None else Step(op, *divmod(visit + ahead, self.layers), number)

    def needs(self) -> Iterator[tuple[int, ...]]:
        """What each of them needs, see `Section`."""
        for section in self.sections:
            yield from section.needs


@lru_cache(maxsize=8)
def numbered(order: str, grid: Grid) -> Numbered:
    """The steps of an order by name. Kept, because a search times many policies on one grid."""
    # Layers so many that what reaches back over slots is told from what reaches back to the token before.
    reach = max(grid.weight_slots, -(-grid.cell_slots // grid.batches)) + _AHEAD
    few = replace(grid, tokens=min(grid.tokens, _TOKENS), layers=min(grid.layers, 2 * reach + 2))
    made = number(ORDERS[order](few), few)
    if few == grid:
        return made
    return _drawn_out(made, few, grid) or number(ORDERS[order](grid), grid)


def number(steps: Iterable[Step], grid: Grid) -> Numbered:
    """Any steps, one by one. Raises KeyError for a step that stands before one that it needs."""
    place: dict[Step | Visit, int] = {}
    sections: list[tuple[list[Entry], list[tuple[int, ...]]]] = [([], [])]

    def add(key: Step | Visit, entry: Entry, needed: list[int]) -> None:
        entries, needs = sections[-1]
        entries.append(entry)
        needs.append(tuple([n - len(place) for n in needed]))
        place[key] = len(place)

    for step in steps:
        op, token, layer, batch = step
        if op is grid.computing[0] and batch == 0 and token + layer > 0:
            sections.append(([], []))
        needed = [place[other] for other in needed_steps(step, grid)]
        if visit := needed_visit(step, grid):
            if visit not in place:
                add(visit, (None, 0, 0), [place[other] for other in visit.steps(grid)])
            needed.append(place[visit])
        add(step, (op, token * grid.layers + layer - len(sections) + 1, batch), needed)
    return Numbered([Section(tuple(entries), tuple(needs)) for entries, needs in sections], grid.layers)


def _drawn_out(made: Numbered, few: Grid, grid: Grid) -> Numbered | None:
    """The schedule of `grid` from that of `few` layers and tokens; None for an order that does not repeat itself."""
    of_token = [made.sections[n * few.layers : (n + 1) * few.layers] for n in range(few.tokens)]
    middle, more = few.layers // 2, grid.layers - few.layers
    if len(made.sections) != few.tokens * few.layers:
        return None
    if grid.tokens > few.tokens and of_token[2] != of_token[3]:
        return None
    if more and any(part[middle - 1] != part[middle] or part[middle] != part[middle + 1] for part in of_token):
        return None
    # What lies farther back than half of the layers is the token before, and that is farther in a deeper model.
    entries = len(of_token[0][middle].entries)
    half, farther = -entries * middle, -entries * more

    def deeper(section: Section) -> Section:
        needs = tuple([tuple([n + farther if n < half else n for n in needed]) for needed in section.needs])
        return Section(section.entries, needs)

    tokens = []
    for part in of_token:
        part = [deeper(section) for section in part]
        tokens.append([*part[:middle], *[part[middle]] * more, *part[middle:]])
    alike = [tokens[2]] * (grid.tokens - few.tokens) if grid.tokens > few.tokens else []
    every = [*tokens[:2], *alike, *tokens[2:]]
    return Numbered([section for part in every for section in part], grid.layers)
