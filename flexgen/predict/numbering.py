"""Schedules as the simulator reads them: each step with the distances to the earlier steps that it needs.

An order repeats the same steps in each visit of a layer, except for the first and the last visits. So only a few
visits are numbered, and the schedule of a deep model or of many tokens is composed of their sections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, Visit, needed_steps, needed_visit

Entry = tuple[Op | None, int, int]
"""A step: its op, its visit relative to that of its section, and its batch or piece. An entry without an op is not a
step: it collects the needs that many steps share."""


class Section(NamedTuple):
    """The steps issued from the first computation of a visit up to that of the next visit."""

    entries: tuple[Entry, ...]
    needs: tuple[tuple[int, ...], ...]
    """For each entry, the entries that must be done before it, relative to it: -1 is the previous entry."""
    visits: frozenset[int]
    """The visits of its entries, relative to its own visit."""


@dataclass(frozen=True, eq=False)
class Numbered:
    """The steps of a schedule in order, with a section for each visit. Equal sections are one object."""

    sections: Sequence[Section]
    layers: int

    def steps(self) -> Iterator[Step | None]:
        """The step of each entry; None for an entry that is not a step."""
        for visit, section in enumerate(self.sections):
            for op, ahead, number in section.entries:
                yield None if op is None else Step(op, *divmod(visit + ahead, self.layers), number)

    def visits(self) -> list[int]:
        """The visit of each entry: token * layers + layer."""
        return [
            visit + ahead for visit, section in enumerate(self.sections) for _, ahead, _ in section.entries
        ]

    def needs(self) -> Iterator[tuple[int, ...]]:
        """The needs of each entry, see `Section`."""
        for section in self.sections:
            yield from section.needs


@lru_cache(maxsize=64)
def numbered(order: Order, grid: Grid) -> Numbered:
    """The steps of an order. Cached, because a search times many policies on one grid."""
    # The number of visits by which an order issues steps before or after the computation, also across both ends.
    ahead = grid.weight_slots + 2
    # From visit `steady` on, all slots have been used before, and only the last visits have less to load. The same
    # holds for tokens: the first has no predecessor, two equal ones show the repetition, and the last prepares none.
    steady = max(grid.weight_slots, -(-grid.cell_slots // grid.batches)) + ahead
    layers = min(grid.layers, steady + 2 + ahead)
    steady_token = 1 + -(-steady // layers)
    few = replace(grid, layers=layers, tokens=min(grid.tokens, steady_token + 2 + -(-ahead // layers)))
    made = _whole(order, few)
    if few == grid:
        return made
    return _drawn_out(made, few, grid, steady, steady_token) or _whole(order, grid)


@lru_cache(maxsize=128)  # models of any depth, and several searches, share these few layers
def _whole(order: Order, grid: Grid) -> Numbered:
    return number(order(grid), grid)


def number(steps: Iterable[Step], grid: Grid) -> Numbered:
    """Number any steps, one by one. Raises KeyError for a step that comes before one that it needs."""
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
    return Numbered(_made(sections), grid.layers)


def _made(sections: Iterable[tuple[Sequence[Entry], Sequence[tuple[int, ...]]]]) -> list[Section]:
    """The sections, with one object for equal ones, so that values derived from a section are computed once."""
    known: dict[Section, Section] = {}
    made = (
        Section(tuple(entries), tuple(needs), frozenset(ahead for _, ahead, _ in entries))
        for entries, needs in sections
    )
    return [known.setdefault(section, section) for section in made]


def _drawn_out(made: Numbered, few: Grid, grid: Grid, layer: int, token: int) -> Numbered | None:
    """The schedule of `grid`, made from that of `few` by copies of a layer and of a token.

    It is None for an order that does not repeat itself.
    """
    more_layers, more_tokens = grid.layers - few.layers, grid.tokens - few.tokens
    if len(made.sections) != few.tokens * few.layers:
        return None
    sections = (
        _farther(made, more_layers * len(made.sections[layer].entries)) if more_layers else made.sections
    )
    tokens = [list(sections[n * few.layers : (n + 1) * few.layers]) for n in range(few.tokens)]
    if more_tokens and tokens[token] != tokens[token + 1]:
        return None
    if more_layers and any(part[layer] != part[layer + 1] for part in tokens[:-1]):
        return None
    deep = [part[:layer] + part[layer : layer + 1] * more_layers + part[layer:] for part in tokens]
    if more_tokens:
        deep = deep[:token] + deep[token : token + 1] * more_tokens + deep[token:]
    return Numbered([section for part in deep for section in part], grid.layers)


def _farther(made: Numbered, entries: int) -> list[Section]:
    """The sections with needs in the same layer at the previous token moved back by `entries`."""
    steps: list[Step] = []
    for step in reversed(list(made.steps())):  # an entry that is not a step belongs to the step after it
        steps.append(step or steps[-1])
    steps.reverse()

    def distance(n: int, back: int) -> int:
        step, needed = steps[n], steps[n + back]
        return back if step.layer != needed.layer or step.token == needed.token else back - entries

    n, sections = 0, []
    for section in made.sections:
        needs = [tuple([distance(m, back) for back in needed]) for m, needed in enumerate(section.needs, n)]
        sections.append((section.entries, needs))
        n += len(needs)
    return _made(sections)
