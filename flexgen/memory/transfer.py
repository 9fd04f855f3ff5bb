"""The work of a step as jobs for lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flexgen.layout.moves import Move, Routes
from flexgen.memory.lanes import Job
from flexgen.policy import Tier
from flexgen.results.trace import LaneName


class Stage(NamedTuple):
    """One job on one lane."""

    lane: LaneName
    job: Job


Chain = tuple[Stage, ...]
"""Consecutive stages, such as disk to host memory, then host memory to the device.

The work of a step is a tuple of independent chains. An empty tuple means that the data of the step is already where
it is needed.
"""

Chains = tuple[Chain, ...]


def bind(routes: Routes, job: Callable[[Tier, Move], Job]) -> Chains:
    """The routes of a layout as jobs. `job` returns the job of a move, for data whose home is on a tier."""
    return tuple(tuple(Stage(m.lane, job(route.tier, m)) for m in route.moves) for route in routes)
