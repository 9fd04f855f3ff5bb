"""The simulator: it times a schedule in virtual time, with the lanes and the trace of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from flexgen.predict.numbering import Numbered, number
from flexgen.results.trace import Event, LaneName, Phase, Trace
from flexgen.schedule.steps import Grid, Op, Step

Costs = Sequence[Sequence[tuple[LaneName, float]]]
"""The work of a step in seconds: chains of stages, each (lane, seconds)."""

_NONE: Mapping[LaneName, float] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Timeline:
    """The times of the steps of a schedule. Events are many objects, so they are made only when they are read."""

    steps: Numbered
    works: Sequence[Costs]
    """The work of each entry of `steps`."""
    done: Sequence[float]
    """The time in seconds at which each entry is done."""
    starts: Sequence[float]
    """The time in seconds at which each stage starts, in the order of issue."""
    ends: Sequence[float]
    """The time in seconds at which each stage ends."""

    @property
    def span(self) -> float:
        """Seconds until all steps are done."""
        return max(self.done, default=0.0)

    def last_ends(self, op: Op, layer: int) -> list[float]:
        """By token, the time at which the last step of `op` in a layer is done."""
        ends = [0.0] * (len(self.steps.sections) // self.steps.layers)
        n = 0
        for visit, section in enumerate(self.steps.sections):
            for of, ahead, _ in section.entries:
                if of is op and (visit + ahead) % self.steps.layers == layer:
                    token = (visit + ahead) // self.steps.layers
                    ends[token] = max(ends[token], self.done[n])
                n += 1
        return ends

    @property
    def events(self) -> list[Event]:
        """The events, in the form of a trace."""
        lanes = [
            (step, lane)
            for step, work in zip(self.steps.steps(), self.works, strict=True)
            if step is not None
            for chain in work
            for lane, _ in chain
        ]
        return [Event(*named, *times) for named, *times in zip(lanes, self.starts, self.ends, strict=True)]


class Alike(NamedTuple):
    """For each layer, the first layer of equal cost.

    weights: for loads of weights, which are equal for all tokens too.
    cells: for all other steps.
    """

    weights: Sequence[int]
    cells: Sequence[int]


class _Visit(dict[tuple[Op, int], Costs]):
    """The work of the steps of a visit, by op and batch or piece. `costs` is called once for each key."""

    def __init__(self, costs: Callable[[Step], Costs], visit: tuple[int, int]) -> None:
        self._costs = costs
        self._visit = visit

    def __missing__(self, key: tuple[Op, int]) -> Costs:
        op, number = key
        self[key] = self._costs(Step(op, *self._visit, number))
        return self[key]


def works_of(steps: Numbered, costs: Callable[[Step], Costs], alike: Alike | None = None) -> list[Costs]:
    """The work of each entry of a schedule. Entries that are not steps have no work.

    A deep model has many steps but few different ones, so `costs` is called once for equal visits.

    alike: the layers of equal cost; None means that all layers differ.
    """
    visits: dict[tuple[int, int], _Visit] = {}
    known: dict[object, list[Costs]] = {}
    works: list[Costs] = []
    for n, section in enumerate(steps.sections):
        cells, weights = {}, {}
        for ahead in section.visits:
            token, layer = cells[ahead] = weights[ahead] = divmod(n + ahead, steps.layers)
            if alike:
                cells[ahead], weights[ahead] = (token, alike.cells[layer]), (0, alike.weights[layer])
        kind = id(section), tuple(cells.values()), tuple(weights.values())
        if kind not in known:
            for visit in (*kind[1], *kind[2]):
                if visit not in visits:
                    visits[visit] = _Visit(costs, visit)
            of_cells, of_weights = (
                {ahead: visits[visit] for ahead, visit in named.items()} for named in (cells, weights)
            )
            known[kind] = [
                () if op is None else (of_weights if op is Op.LOAD_WEIGHTS else of_cells)[ahead][op, number]
                for op, ahead, number in section.entries
            ]
        works += known[kind]
    return works


def simulate(steps: Iterable[Step], grid: Grid, costs: Callable[[Step], Costs]) -> Trace:
    """The trace of steps, with lanes that serve in the order of issue and do not slow each other down.

    As in the executor, a stage starts when its lane is free and the stage before it is done. The first stage waits
    for all needs of the step. Raises KeyError for an order that `schedule.check` rejects.
    """
    made = number(steps, grid)
    return Trace(play(made, works_of(made, costs)).events)


def play(
    steps: Numbered,
    works: Sequence[Costs],
    factors: Iterable[float] | None = None,
    inline: bool = False,
    startup: Mapping[LaneName, float] = _NONE,
) -> Timeline:
    """`simulate` for numbered steps and the work of each entry. Predictions spend most of their time here.

    factors: for each stage, the factor of its seconds; None is 1.
    inline: whether the thread that issues the steps also computes. Then no step begins before the computations that
        were issued earlier have ended, even if its lane is free and it needs none of them.
    startup: by lane, the seconds that a stage needs to start, from the time when it is ready. During this time, the
        lane may still work on the previous stage. For the computation of an `inline` device, it applies if the thread
        has waited for the needs of the step, and is at most as long as this wait. Other devices have none.
    """
    free = dict.fromkeys(LaneName, 0.0)
    factor = repeat(1.0) if factors is None else iter(factors)
    issuing = LaneName.COMPUTE if inline else None
    wakes = startup.get(LaneName.COMPUTE, 0.0)
    startup = {lane: seconds for lane, seconds in startup.items() if lane is not LaneName.COMPUTE}
    issued = 0.0
    done: list[float] = []
    starts: list[float] = []
    ends: list[float] = []
    for needed, work in zip(steps.needs(), works, strict=True):
        ready = issued
        for n in needed:
            if done[n] > ready:
                ready = done[n]
        end, waited = ready, ready - issued
        for chain in work:
            time = ready
            for lane, seconds in chain:
                start = free[lane] if free[lane] > time else time
                starts.append(start)
                if lane in startup:
                    start = max(start, time + startup[lane])
                elif lane is issuing:
                    start += min(wakes, waited)
                    waited = 0.0
                time = start + seconds * next(factor)
                free[lane] = time
                ends.append(time)
                if lane is issuing:
                    issued = time
            if time > end:
                end = time
        done.append(end)
    return Timeline(steps, works, done, starts, ends)


Losses = Mapping[Phase, Mapping[tuple[LaneName, LaneName], float]]
"""By phase and lanes, the share of its rate that the first lane loses while the second one works."""

_ROUNDS = 5
_SETTLED = 1e-3
_MOST_LOST = 0.9


def play_with_losses(
    steps: Numbered,
    works: Sequence[Costs],
    losses: Losses,
    prefill: int | Sequence[bool] = 1,
    inline: bool = False,
    startup: Mapping[LaneName, float] = _NONE,
) -> Timeline:
    """`play` with lanes that slow each other down while they work at the same time.

    The schedule is timed, and each stage is lengthened by its losses to the stages that it overlaps. This repeats for
    a few rounds, until the end of the schedule no longer changes. Losses are spread evenly over a stage.

    prefill: the number of passes of the prefill, or for each entry of the schedule, whether it is in the prefill.
    inline, startup: as in `play`.
    """
    made = play(steps, works, inline=inline, startup=startup)
    if not losses:
        return made
    lanes = np.array([_NUMBER[lane] for work in works for chain in work for lane, _ in chain], dtype=int)
    stages = [sum(map(len, work)) for work in works]
    if isinstance(prefill, int):
        prefill = [visit < prefill * steps.layers for visit in steps.visits()]
    in_prefill = np.repeat(prefill, stages)
    for _ in range(_ROUNDS):
        before = made.span
        stretched = _stretched(lanes, in_prefill, np.array(made.starts), np.array(made.ends), losses)
        made = play(steps, works, stretched, inline, startup)
        if abs(made.span - before) <= _SETTLED * before:
            break
    return made


def _stretched(
    lanes: np.ndarray, prefill: np.ndarray, begin: np.ndarray, end: np.ndarray, losses: Losses
) -> list[float]:
    """The factor by which overlap lengthens each stage. `prefill`: for each stage, whether it is in the prefill."""
    lost = np.zeros(len(lanes))
    of_phase = {Phase.PREFILL: prefill, Phase.DECODE: ~prefill}
    shares = ((phase, pair, share) for phase, pairs in losses.items() for pair, share in pairs.items())
    for phase, (lane, other), share in shares:
        mine, theirs = of_phase[phase] & (lanes == _NUMBER[lane]), lanes == _NUMBER[other]
        if not mine.any() or not theirs.any():
            continue
        # The seconds of work of the other lane until a given time. It serves one stage after another.
        edges = np.stack([begin[theirs], end[theirs]], axis=1).ravel()
        worked = np.repeat(np.cumsum(end[theirs] - begin[theirs]), 2)
        worked[::2] -= end[theirs] - begin[theirs]
        both = np.interp(end[mine], edges, worked) - np.interp(begin[mine], edges, worked)
        took = end[mine] - begin[mine]
        lost[mine] += share * np.divide(both, took, out=np.zeros_like(both), where=took > 0)
    stretched: list[float] = (1 / (1 - np.minimum(lost, _MOST_LOST))).tolist()
    return stretched


_NUMBER = {lane: n for n, lane in enumerate(LaneName)}
