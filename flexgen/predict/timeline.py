"""The simulator: times a schedule in virtual time, with the same lanes and the same trace as a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from flexgen.predict.numbering import Numbered, number
from flexgen.results.trace import Event, LaneName, Phase, Trace
from flexgen.schedule.steps import Grid, Op, Step

Costs = Sequence[Sequence[tuple[LaneName, float]]]
"""The work of a step as the executor sees it, in seconds: chains of stages, each (lane, seconds)."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """When every step of a schedule is done. Its events are many objects, so they are made only where one asks."""

    steps: Numbered
    works: Sequence[Costs]
    """Of each entry of `steps`."""
    done: Sequence[float]
    """Seconds at which it was done."""
    stretched: Sequence[float] | None = None
    """How many times its seconds each stage took."""

    @property
    def span(self) -> float:
        """Seconds until all was done."""
        return max(self.done, default=0.0)

    def ends(self, op: Op, layer: int) -> list[float]:
        """When the last step of an op in a layer was done, by token."""
        ends = [0.0] * (len(self.steps.sections) // self.steps.layers)
        n = 0
        for visit, section in enumerate(self.steps.sections):
            for of, ahead, _ in section.entries:
                if of is op and (visit + ahead) % self.steps.layers == layer:
                    token = (visit + ahead) // self.steps.layers
                    ends[token] = max(ends[token], self.done[n])
                n += 1
        return ends

    def edges(self) -> tuple[list[float], list[float]]:
        """Of every stage in the order of issue: when it starts and when it ends."""
        starts: list[float] = []
        ends: list[float] = []
        _lay_out(self.steps, self.works, self.stretched, starts, ends)
        return starts, ends

    @property
    def events(self) -> list[Event]:
        """As of a trace."""
        lanes = [
            (step, lane)
            for step, work in zip(self.steps.steps(), self.works, strict=True)
            if step is not None
            for chain in work
            for lane, _ in chain
        ]
        return [Event(*named, *times) for named, *times in zip(lanes, *self.edges(), strict=True)]


class _Asked(dict[tuple[Op, int], Costs]):
    """What the steps of a visit take, by op and batch or piece; asked when it is looked for."""

    def __init__(self, costs: Callable[[Step], Costs], token: int, layer: int) -> None:
        self._costs = costs
        self._visit = token, layer

    def __missing__(self, key: tuple[Op, int]) -> Costs:
        op, number = key
        self[key] = self._costs(Step(op, *self._visit, number))
        return self[key]


def works_of(
    steps: Numbered, costs: Callable[[Step], Costs], alike: Sequence[int] | None = None
) -> list[Costs]:
    """The work of every entry of a schedule, nothing for one that is no step.

    alike: for each layer the first whose steps take the same, but for loads of weights, which are then taken to be
    the same for every token. A deep model has very many steps and few that differ: costs are asked by kind.
    """
    cells: dict[tuple[int, int], _Asked] = {}
    weights: dict[tuple[int, int], _Asked] = {}
    works: list[Costs] = []
    for visit, section in enumerate(steps.sections):
        of_cells, of_weights = {}, {}
        for ahead in section.visits:
            token, layer = divmod(visit + ahead, steps.layers)
            cell, weight = ((token, layer),) * 2 if alike is None else ((token, alike[layer]), (0, layer))
            of_cells[ahead] = cells.setdefault(cell, _Asked(costs, *cell))
            of_weights[ahead] = weights.setdefault(weight, _Asked(costs, *weight))
        works += [
            () if op is None else (of_weights if op is Op.LOAD_WEIGHTS else of_cells)[ahead][op, number]
            for op, ahead, number in section.entries
        ]
    return works


def simulate(steps: Iterable[Step], grid: Grid, costs: Callable[[Step], Costs]) -> Trace:
    """When each stage would start and end if lanes served in the order of issue and nothing else interfered.

    A stage starts when its lane is free and the stage before it, or for the first one all that the step needs,
    is done: the executor's own rules. Raises KeyError for an order that `schedule.check` refuses.
    """
    made = number(steps, grid)
    return Trace(play(made, works_of(made, costs)).events)


def play(steps: Numbered, works: Sequence[Costs]) -> Timeline:
    """`simulate`, for steps that are numbered already, and the work of each of them."""
    return Timeline(steps, works, _lay_out(steps, works))


def _lay_out(
    steps: Numbered,
    works: Sequence[Costs],
    stretched: Sequence[float] | None = None,
    starts: list[float] | None = None,
    ends: list[float] | None = None,
) -> list[float]:
    """When each step is done. This is where a prediction spends its time.

    stretched: how many times its seconds each stage takes. starts, ends: get the times of every stage.
    """
    free = dict.fromkeys(LaneName, 0.0)
    factors = repeat(1.0) if stretched is None else iter(stretched)
    done: list[float] = []
    for needed, work in zip(steps.needs(), works, strict=True):
        ready = 0.0
        for n in needed:
            if done[n] > ready:
                ready = done[n]
        end = ready
        for chain in work:
            time = ready
            for lane, seconds in chain:
                if free[lane] > time:
                    time = free[lane]
                if starts is not None:
                    starts.append(time)
                time += seconds * next(factors)
                free[lane] = time
                if ends is not None:
                    ends.append(time)
            if time > end:
                end = time
        done.append(end)
    return done


Losses = Mapping[Phase, Mapping[tuple[LaneName, LaneName], float]]
"""The share of the first lane's rate, in steps of that phase, that is lost while the second one works."""

_ROUNDS = 5
_SETTLED = 1e-3
_MOST_LOST = 0.9


def play_beside(steps: Numbered, works: Sequence[Costs], losses: Losses, prefill: int = 1) -> Timeline:
    """`play`, where lanes that work at the same time slow each other down. `prefill`: how many passes are of it.

    By turns the schedule is laid out, and each stage made longer by what it loses to those it overlaps: a few rounds,
    until the end no longer moves. A stage is slowed evenly over its time.
    """
    made = play(steps, works)
    if not losses:
        return made
    stages = [
        (_NUMBER[lane], step.token)
        for step, work in zip(steps.steps(), works, strict=True)
        if step is not None
        for chain in work
        for lane, _ in chain
    ]
    lanes, tokens = np.array(stages, dtype=int).reshape(-1, 2).T
    for _ in range(_ROUNDS):
        before = made.span
        starts, ends = map(np.array, made.edges())
        stretched = _stretched(lanes, tokens < prefill, starts, ends, losses)
        made = Timeline(steps, works, _lay_out(steps, works, stretched), stretched)
        if abs(made.span - before) <= _SETTLED * before:
            break
    return made


def _stretched(
    lanes: np.ndarray, prefill: np.ndarray, begin: np.ndarray, end: np.ndarray, losses: Losses
) -> list[float]:
    """How many times its own seconds each stage takes beside the others. `prefill`: whether it is of that phase."""
    lost = np.zeros(len(lanes))
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
    stretched: list[float] = (1 / (1 - np.minimum(lost, _MOST_LOST))).tolist()
    return stretched


_NUMBER = {lane: n for n, lane in enumerate(LaneName)}
