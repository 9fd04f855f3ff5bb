"""The simulator: times a schedule in virtual time, with the same lanes and the same trace as a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flexgen.schedule import Grid, Step, needs
from flexgen.trace import Event, LaneName, Trace

Costs = Sequence[Sequence[tuple[LaneName, float]]]
"""The work of a step as the executor sees it, in seconds: chains of stages, each (lane, seconds)."""


def simulate(steps: Iterable[Step], grid: Grid, costs: Callable[[Step], Costs]) -> Trace:
    """When each stage would start and end if lanes served in the order of issue and nothing else interfered.

    A stage starts when its lane is free and the stage before it, or for the first one all that the step needs,
    is done: the executor's own rules. Raises KeyError for an order that `schedule.check` refuses.
    """
    free = dict.fromkeys(LaneName, 0.0)
    done: dict[Step, float] = {}
    events: list[Event] = []
    for step in steps:
        ready = max((done[needed] for needed in needs(step, grid)), default=0.0)
        ends = []
        for chain in costs(step):
            time = ready
            for lane, seconds in chain:
                start = max(time, free[lane])
                time = free[lane] = start + seconds
                events.append(Event(step, lane, start, time))
            ends.append(time)
        done[step] = max(ends, default=ready)
    return Trace(events)
