"""The work of a step on each lane, and its time on the lanes of a machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flexgen.layout.moves import Kind, Move, Route
from flexgen.predict.hardware import Hardware
from flexgen.results.trace import LaneName


class Load(NamedTuple):
    """One stage of a step: the work of its lane.

    nbytes: the bytes that cross the link or that the disk reads or writes. For a computation, those of the queries
        and attention outputs of the host's rows, without the values that sparse attention reads.
    seconds: the time of the stage. It includes the reads of sparse attention.
    """

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
        # If the compute device is the host, the computing thread also makes the host's copies.
        self._host = LaneName.COMPUTE if hardware.topology.shares_host_memory else LaneName.HOST

    def seconds(self, move: Move) -> float:
        on_disk = move.lane in (LaneName.DISK_READ, LaneName.DISK_WRITE)
        fixed = self._fixed.disk_job if on_disk else self._fixed.stage
        if move.kind is Kind.RECORD:
            fixed = self._fixed.ids or fixed
        return fixed + move.nbytes / self._bandwidth[move.lane]

    def load(self, move: Move) -> Load:
        lane = self._host if move.lane is LaneName.HOST else move.lane
        return Load(lane, move.nbytes, self.seconds(move))

    def loads(self, routes: Iterable[Route]) -> Loads:
        """A chain for each route that has moves."""
        return tuple(tuple(map(self.load, route.moves)) for route in routes if route.moves)
