"""The moves of a step: routes, whose moves each use one lane."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from flexgen.policy import Tier
from flexgen.results.trace import LaneName
from flexgen.units import align


class Kind(Enum):
    """The operation of a move. Its lane is the resource."""

    COPY = auto()  # across the link, or within host memory to a buffer that a disk can write from
    READ = auto()  # reads whole disk blocks
    WRITE = auto()
    GATHER = auto()  # gathers rows of a table at its home
    PUT = auto()  # writes keys and values that have arrived in host memory to their pages
    RECORD = auto()  # stores new ids and does the caller's bookkeeping


class Move(NamedTuple):
    """One stage of a route: `nbytes` of data for `lane`."""

    lane: LaneName
    nbytes: int
    kind: Kind = Kind.COPY


class Route(NamedTuple):
    """Consecutive moves of data whose home is on `tier`. The routes of a step are independent."""

    tier: Tier
    moves: tuple[Move, ...]


Routes = tuple[Route, ...]


def along(tier: Tier, lanes: Sequence[LaneName], nbytes: int, blocks: int) -> Route:
    """A route of the same data over several lanes: `nbytes` bytes, or `blocks` bytes in whole blocks for a disk."""
    kinds = {LaneName.DISK_READ: Kind.READ, LaneName.DISK_WRITE: Kind.WRITE}
    return Route(
        tier,
        tuple(Move(lane, blocks if lane in kinds else nbytes, kinds.get(lane, Kind.COPY)) for lane in lanes),
    )


class Range(NamedTuple):
    """Bytes `begin` to `end` of item number `item`."""

    item: int
    begin: int
    end: int


def cut(lengths: Sequence[int], piece: int, pieces: int, grain: int) -> list[Range]:
    """The part of several byte items that moves as `piece` of `pieces`.

    The pieces have nearly equal sizes, cover all bytes once, and begin at multiples of `grain` bytes
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
