"""How the work of a step is handed to lanes, and how long transfers are cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flexgen.memory.lanes import Job
from flexgen.trace import LaneName
from flexgen.units import align


class Stage(NamedTuple):
    """One job on one lane."""

    lane: LaneName
    job: Job


Chain = tuple[Stage, ...]
"""Stages that follow one another, such as disk to host memory, then host memory to the device.

The work of a step is a tuple of chains that are independent of each other; none means that what the step
is for is already where it is needed.
"""

Chains = tuple[Chain, ...]


class Range(NamedTuple):
    """Bytes `begin` to `end` of item number `item`."""

    item: int
    begin: int
    end: int


def cut(lengths: Sequence[int], piece: int, pieces: int, grain: int) -> list[Range]:
    """The part of several byte items that travels as `piece` of `pieces`.

    The pieces are of nearly equal size, cover everything once, and begin at multiples of `grain` bytes
    within each item.
    """
    total = sum(lengths)
    first, last = (total * n // pieces for n in (piece, piece + 1))
    ranges, base = [], 0
    for index, length in enumerate(lengths):
        begin, end = (min(max(align(max(edge - base, 0), grain), 0), length) for edge in (first, last))
        if begin < end:
            ranges.append(Range(index, begin, end))
        base += length
    return ranges
