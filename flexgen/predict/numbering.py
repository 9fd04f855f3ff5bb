"""Schedules as the simulator reads them: each step with how far before it those stand that it needs.

An order does the same in every visit of a layer, but for the first visits and the last. So a few visits are
numbered, and the schedule of a deep model or of many tokens is put together from their sections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, Visit, needed_steps, needed_visit

Entry = tuple[Op | None, int, int]
"""A step: its op, its visit counted from that of its section, and its batch or piece. None in place of an op stands
for no step, but for all that it needs: many steps wait for the same many."""


class Section(NamedTuple):
    """What is issued from the first computation of a visit to that of the next one."""

    entries: tuple[Entry, ...]
    needs: tuple[tuple[int, ...], ...]
    """For each entry those that must be done before it: -1 is the entry right before it."""
    visits: frozenset[int]
    """Those that its entries belong to, counted from its own."""


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

    def visits(self) -> list[int]:
        """The visit of each entry: token * layers + layer."""
        return [
            visit + ahead for visit, section in enumerate(self.sections) for _, ahead, _ in section.entries
        ]

    def needs(self) -> Iterator[tuple[int, ...]]:
        """What each of them needs, see `Section`."""
        for section in self.sections:
            yield from section.needs


@lru_cache(maxsize=8)
def numbered(order: Order, grid: Grid) -> Numbered:
    """The steps of an order. Cached, because a search times many policies on one grid."""
    # Visits that an order issues steps ahead of the computation, across the ends too, or leaves them behind it.
    ahead = grid.weight_slots + 2
    # From that visit on every one finds slots that others have used, and the last ones have less and less to fetch.
    # Tokens likewise: the first has none before it, two show that they are alike, and the last prepares none.
    steady = max(grid.weight_slots, -(-grid.cell_slots // grid.batches)) + ahead
    layers = min(grid.layers, steady + 2 + ahead)
    steady_token = 1 + -(-steady // layers)
    few = replace(grid, layers=layers, tokens=min(grid.tokens, steady_token + 2 + -(-ahead // layers)))
    made = _whole(order, few)
    if few == grid:
        return made
    return _drawn_out(made, few, grid, steady, steady_token) or _whole(order, grid)


@lru_cache(maxsize=32)  # models of any depth have these few layers in common, and so have several searches
def _whole(order: Order, grid: Grid) -> Numbered:
    return number(order(grid), grid)


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
    return Numbered(_made(sections), grid.layers)


def _made(sections: Iterable[tuple[Sequence[Entry], Sequence[tuple[int, ...]]]]) -> list[Section]:
    """The same object for sections that are equal: what follows from one of them is made once."""
    known: dict[Section, Section] = {}
    made = (
        Section(tuple(entries), tuple(needs), frozenset(ahead for _, ahead, _ in entries))
        for entries, needs in sections
    )
    return [known.setdefault(section, section) for section in made]


def _drawn_out(made: Numbered, few: Grid, grid: Grid, layer: int, token: int) -> Numbered | None:
    """The schedule of `grid` from that of `few` layers and tokens, with copies of a layer and of a token; None for an
    order that does not repeat itself."""
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
    """Its sections, where a need of a step in its own layer, at the token before, is `entries` farther back."""
    steps: list[Step] = []
    for step in reversed(list(made.steps())):  # what stands for no step is needed by the one behind it
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
