"""What a step asks of each lane, and how long the lanes of a machine take for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flexgen.layout.moves import Move, Route
from flexgen.predict.hardware import Hardware
from flexgen.results.trace import LaneName


class Load(NamedTuple):
    """One stage of a step: what it asks of its lane. `nbytes` cross a link or reach a disk. For a computation they
    are the queries and answers of the rows whose attention the host computes. Values that sparse attention reads
    while it computes are in the seconds alone."""

    lane: LaneName
    nbytes: int
    seconds: float


Loads = tuple[tuple[Load, ...], ...]
"""The chains of a step."""


class LaneTimes:
    """Seconds of moves on the lanes of a machine."""

    def __init__(self, hardware: Hardware) -> None:
        self._bandwidth = hardware.bandwidth
        self._fixed = hardware.fixed
        # What the host does for a device that shares its memory is done by the thread that computes.
        self._host = LaneName.COMPUTE if hardware.topology.shares_host_memory else LaneName.HOST

    def seconds(self, move: Move) -> float:
        on_disk = move.lane in (LaneName.DISK_READ, LaneName.DISK_WRITE)
        fixed = self._fixed.disk_job if on_disk else self._fixed.stage
        return fixed + move.nbytes / self._bandwidth[move.lane]

    def load(self, move: Move) -> Load:
        lane = self._host if move.lane is LaneName.HOST else move.lane
        return Load(lane, move.nbytes, self.seconds(move))

    def loads(self, routes: Iterable[Route]) -> Loads:
        """A chain for each route that has moves."""
        return tuple(tuple(map(self.load, route.moves)) for route in routes if route.moves)
