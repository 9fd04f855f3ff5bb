"""The simulator: times a schedule in virtual time, with the same lanes and the same trace as a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from flexgen.schedule import ORDERS, Grid, Step, Visit, needed_steps, needed_visit
from flexgen.trace import Event, LaneName, Phase, Trace

Costs = Sequence[Sequence[tuple[LaneName, float]]]
"""The work of a step as the executor sees it, in seconds: chains of stages, each (lane, seconds)."""

Numbered = Iterable[tuple[Step | None, tuple[int, ...]]]
"""Steps in their order, each with the places in it of what it needs. None stands for no step but for all that it
needs: many steps wait for the same many."""


def simulate(steps: Iterable[Step], grid: Grid, costs: Callable[[Step], Costs]) -> Trace:
    """When each stage would start and end if lanes served in the order of issue and nothing else interfered.

    A stage starts when its lane is free and the stage before it, or for the first one all that the step needs,
    is done: the executor's own rules. Raises KeyError for an order that `schedule.check` refuses.
    """
    return play(_number(steps, grid), costs)


Losses = Mapping[Phase, Mapping[tuple[LaneName, LaneName], float]]
"""The share of the first lane's rate, in steps of that phase, that is lost while the second one works."""

_ROUNDS = 5
_SETTLED = 1e-3
_MOST_LOST = 0.9


def play_beside(steps: Numbered, costs: Callable[[Step], Costs], losses: Losses) -> Trace:
    """`play`, where lanes that work at the same time slow each other down.

    By turns the schedule is laid out, and each stage made longer by what it loses to those it overlaps: a few rounds,
    until the end no longer moves. A stage is slowed evenly over its time.
    """
    trace = play(steps, costs)
    for _ in range(_ROUNDS if losses else 0):
        before = trace.span
        trace = play(steps, costs, _stretched(trace.events, losses))
        if abs(trace.span - before) <= _SETTLED * before:
            break
    return trace


def _stretched(events: Sequence[Event], losses: Losses) -> Sequence[float]:
    """How many times its own seconds each event takes beside the others."""
    lanes = np.array([_NUMBER[event.lane] for event in events])
    begin, end = (np.array([getattr(event, name) for event in events]) for name in ("start", "end"))
    lost = np.zeros(len(events))
    prefill = np.array([event.step.token == 0 for event in events])
    of_phase = {Phase.PREFILL: prefill, Phase.DECODE: ~prefill}
    shares = ((phase, pair, share) for phase, pairs in losses.items() for pair, share in pairs.items())
    for phase, (lane, other), share in shares:
        mine, theirs = of_phase[phase] & (lanes == _NUMBER[lane]), lanes == _NUMBER[other]
        if not mine.any() or not theirs.any():
            continue
        # Seconds that the other has worked until any time: it serves one stage after another.
        edges = np.stack([begin[theirs], end[theirs]], axis=1).ravel()
        worked = np.repeat(np.cumsum(end[theirs] - begin[theirs]), 2)
        worked[::2] -= end[theirs] - begin[theirs]
        both = np.interp(end[mine], edges, worked) - np.interp(begin[mine], edges, worked)
        took = end[mine] - begin[mine]
        lost[mine] += share * np.divide(both, took, out=np.zeros_like(both), where=took > 0)
    stretched: Sequence[float] = (1 / (1 - np.minimum(lost, _MOST_LOST))).tolist()
    return stretched


_NUMBER = {lane: n for n, lane in enumerate(LaneName)}


def play(steps: Numbered, costs: Callable[[Step], Costs], stretched: Sequence[float] | None = None) -> Trace:
    """`simulate`, for steps that are numbered already. `stretched`: how many times its seconds each event takes."""
    free = dict.fromkeys(LaneName, 0.0)
    done: list[float] = []
    events: list[Event] = []
    for step, needed in steps:
        ready = 0.0
        for n in needed:
            if done[n] > ready:
                ready = done[n]
        if step is None:
            done.append(ready)
            continue
        end = 0.0
        work = costs(step)
        for chain in work:
            time = ready
            for lane, seconds in chain:
                start = max(time, free[lane])
                if stretched is not None:
                    seconds *= stretched[len(events)]
                time = free[lane] = start + seconds
                events.append(Event(step, lane, start, time))
            end = max(end, time)
        done.append(end if work else ready)
    return Trace(events)


def _number(steps: Iterable[Step], grid: Grid) -> Iterator[tuple[Step | None, tuple[int, ...]]]:
    place: dict[Step | Visit, int] = {}
    for step in steps:
        needed = [place[other] for other in needed_steps(step, grid)]
        if visit := needed_visit(step, grid):
            if visit not in place:
                yield None, tuple([place[other] for other in visit.steps(grid)])
                place[visit] = len(place)
            needed.append(place[visit])
        yield step, tuple(needed)
        place[step] = len(place)


_FEW = 5
"""Tokens after which nothing new comes: the first two begin, the last one ends, and those between are alike."""


@lru_cache(maxsize=4)
def numbered(order: str, grid: Grid) -> Sequence[tuple[Step | None, tuple[int, ...]]]:
    """The steps of an order by name. Kept, because a search times many policies on one grid.

    Of many tokens a few are numbered, and what repeats is copied, which is many times faster.
    """
    few = replace(grid, tokens=min(grid.tokens, _FEW))
    steps = list(_number(ORDERS[order](few), few))
    if few == grid:
        return steps
    begins: dict[int, int] = {}
    for n, (step, _) in enumerate(steps):
        if step is not None and step.op is grid.computing[0] and step.layer == step.batch == 0:
            begins.setdefault(step.token, n)
    first, second, third = (begins[token] for token in (2, 3, 4))
    length = second - first
    if list(_shifted(steps[first:second], 1, length)) != steps[second:third]:
        return tuple(_number(ORDERS[order](grid), grid))
    more = grid.tokens - few.tokens
    copies = [entry for n in range(more) for entry in _shifted(steps[first:second], n + 1, (n + 1) * length)]
    return [*steps[:second], *copies, *_shifted(steps[second:], more, more * length)]


def _shifted(
    steps: Iterable[tuple[Step | None, tuple[int, ...]]], tokens: int, places: int
) -> Iterator[tuple[Step | None, tuple[int, ...]]]:
    for step, needed in steps:
        later = None if step is None else Step(step[0], step[1] + tokens, step[2], step[3])
        yield later, tuple([n + places for n in needed])
