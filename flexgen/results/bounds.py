"""The lower bound of a run's time: the slowest lane of each phase."""

from __future__ import annotations

from collections.abc import Mapping

from flexgen.results.trace import LaneName, Phase


def timed_lanes(host_attends: bool) -> tuple[LaneName, ...]:
    """The lanes of a bound: those whose work can run alone, with any contents of the buffers.

    The host's lane is one of them if the host computes attention. FROM_DEVICE is not: its data exists only after the
    cell has been computed.
    """
    lanes = LaneName.COMPUTE, LaneName.TO_DEVICE, LaneName.DISK_READ, LaneName.DISK_WRITE
    return (*lanes, LaneName.HOST) if host_attends else lanes


def bound_seconds(phases: Mapping[Phase, Mapping[LaneName, float]]) -> float:
    """The lower bound of the time of all orders in seconds, except for prefetches from one phase to the next.

    phases: the seconds that each lane needs if it runs alone. A phase takes at least as long as its slowest lane, and
    the decode of a block follows its prefill: only the layers in the slots can overlap between the two.
    """
    return sum(max(lanes.values()) for lanes in phases.values() if lanes)
