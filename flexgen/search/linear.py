"""Placement as a linear program. Up to rounding, the seconds of each lane and the bytes of each tier are affine in
the shares of a policy.

`corners` computes the coefficients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexgen.policy import Policy, Tier
from flexgen.results.trace import LaneName
from flexgen.workload import Workload

CLASSES = "weights", "cache", "activations"
LANES = tuple(LaneName)
LANE_ROW = {lane: row for row, lane in enumerate(LANES)}

IN_TURN = len(LANES)
"""The row of a batch's serial work: its hidden states in, its computation, and its hidden states out."""
UNHIDDEN = len(LANES) + 1
"""The row of the computation and of the weight loads that it cannot hide, because there is no second slot."""
ROWS = len(LANES) + 2
_OTHER_LANES = 0.01
"""The weight of the seconds of lanes that are not the longest. It selects, among equally fast placements, the one
that moves less data, because no order overlaps perfectly."""


class Column(NamedTuple):
    """One way to store all of a class of data."""

    what: str  # weights, cache, activations
    tier: Tier
    codec: str = "none"


Shares = Mapping[Column, float]
"""The share of its class that each column stores, 0 to 1."""


def shares_of(policy: Policy) -> Shares:
    """The shares of a policy's classes, by tier and codec."""
    splits = {"weights": policy.weights, "cache": policy.cache, "activations": policy.activations}
    return {
        Column(what, tier, split[tier].codec): split.percent(tier) / 100
        for what, split in splits.items()
        for tier in Tier
        if split.percent(tier)
    }


def blocks(workload: Workload, policy: Policy) -> float:
    """The workload's time as a multiple of the time of a full block."""
    return workload.groups * max(workload.num_prompts / workload.groups / policy.block_size, 1.0)


def longest_lanes(phases: Iterable[Mapping[LaneName, float]], joined: bool) -> float:
    """The seconds of the longest lane of each phase, summed; or if they are `joined`, of all phases together."""
    if not joined:
        return sum(max(lanes.values(), default=0.0) for lanes in phases)
    total: Counter[LaneName] = Counter()
    for lanes in phases:
        total.update(lanes)
    return max(total.values(), default=0.0)


@dataclass(frozen=True)
class Figures:
    """The seconds by phase and row (2, rows) and the bytes by tier (3,) of a block, affine in the shares.

    base: the values if each class is stored by its first column.
    change: by column, the change of the values if the column stores all of its class.
    """

    columns: tuple[Column, ...]
    base: np.ndarray
    change: np.ndarray  # (columns, 2 * rows + 3)
    serial: bool  # no steps overlap, even on different lanes
    joined: bool = False  # prompts are computed in passes of the decode, so both phases overlap

    def at(self, shares: Shares) -> np.ndarray:
        part = np.array([shares.get(column, 0.0) for column in self.columns])
        return np.asarray(self.base + part @ self.change)

    def seconds(self, shares: Shares) -> list[dict[LaneName, float]]:
        """The seconds of prefill and decode, by lane."""
        return [dict(zip(LANES, row.tolist(), strict=False)) for row in self.at(shares)[:-3].reshape(2, ROWS)]

    def bound(self, shares: Shares, lanes: Iterable[Collection[LaneName]]) -> float:
        """The seconds of the longest lane of each phase, or of both phases together if they are joined.

        lanes: those that each phase has.
        """
        alone = [
            {lane: each[lane] for lane in some}
            for each, some in zip(self.seconds(shares), lanes, strict=True)
        ]
        return longest_lanes(alone, self.joined)

    def of_lane(self, phase: int, lane: LaneName, shares: Shares) -> dict[str, float]:
        """The seconds of a lane due to each class, beyond those if the class were on the tier with the fewest."""
        row = phase * ROWS + LANES.index(lane)
        asks = dict(zip(self.columns, self.change[:, row], strict=True))
        return {
            what: sum(shares.get(c, 0.0) * asks[c] for c in asks if c.what == what)
            - min(asks[c] for c in asks if c.what == what)
            for what in CLASSES
        }


@dataclass(frozen=True)
class Solution:
    """Shares, the `seconds` of prefill plus decode, and the seconds that one more byte of each tier would save."""

    shares: Shares
    seconds: float
    saved: Mapping[Tier, float]


def solve(
    figures: Figures,
    capacity: np.ndarray,
    given: Shares | None = None,
    without: Iterable[Column] = (),
    elastic: bool = False,
) -> Solution | None:
    """The shares with the shortest prefill plus decode, or None if nothing fits.

    capacity: bytes by tier.
    given: the shares that are fixed.
    without: the columns whose shares are 0.
    elastic: whether the capacities may be exceeded, by the fewest bytes possible.
    """
    from scipy.optimize import linprog  # slow to import, and only a search solves programs

    n, without = len(figures.columns), set(without)
    seconds = figures.base[:-3].reshape(2, ROWS)
    rows = figures.change[:, :-3].reshape(n, 2, ROWS)
    if figures.joined:  # all seconds are those of the first phase
        seconds, rows = _joined(seconds), _joined(rows)
    if figures.serial:  # each lane waits for the others
        seconds, rows = seconds[:, : len(LANES)], rows[:, :, : len(LANES)]
        limits_seconds, limits_rows = seconds.sum(1, keepdims=True), rows.sum(2, keepdims=True)
    else:
        limits_seconds, limits_rows = seconds, rows
    unit = max(float(np.abs(figures.base[:-3]).max()), float(np.abs(figures.change[:, :-3]).max()), 1e-12)
    width = limits_seconds.shape[1]
    # Variables: the shares, the seconds of prefill and decode in `unit`, and the excess of each tier.
    longest = np.zeros((2 * width, n + 5))
    longest[:, :n] = limits_rows.transpose(1, 2, 0).reshape(2 * width, n) / unit
    longest[:width, n] = longest[width:, n + 1] = -1
    scale = np.maximum(capacity, 1.0)
    room = np.zeros((3, n + 5))
    room[:, :n] = figures.change[:, -3:].T / scale[:, None]
    room[:, n + 2 :] = -np.eye(3)
    whole = np.zeros((len(CLASSES), n + 5))
    for row, what in enumerate(CLASSES):
        whole[row, :n] = [column.what == what for column in figures.columns]
    lanes = rows[:, :, : len(LANES)].sum((1, 2)) / unit
    cost = np.concatenate([_OTHER_LANES * lanes, [1, 1], 1e6 * scale / scale.max() * elastic])
    bounds: list[tuple[float, float | None]] = []
    for column in figures.columns:
        settled = given is not None and any(other.what == column.what for other in given)
        share = given.get(column, 0.0) if given is not None else 0.0
        bounds.append((share, share) if settled else (0, 0 if column in without else 1))
    bounds += [(0, None)] * 2 + [(0, None if elastic else 0)] * 3
    solved = linprog(
        cost,
        A_ub=np.concatenate([longest, room]),
        b_ub=np.concatenate([-limits_seconds.ravel() / unit, (capacity - figures.base[-3:]) / scale]),
        A_eq=whole,
        b_eq=np.ones(len(CLASSES)),
        bounds=bounds,
        method="highs",
    )
    if not solved.success:
        return None
    shares = {c: float(x) for c, x in zip(figures.columns, solved.x, strict=False) if x > 1e-9}
    saved = dict(zip(Tier, -solved.ineqlin.marginals[-3:] * unit / scale, strict=True))
    return Solution(shares, float(solved.x[n] + solved.x[n + 1]) * unit, saved)


def _joined(seconds: np.ndarray) -> np.ndarray:
    """(..., 2, rows) with the sum of both phases, and zeros."""
    total = seconds.sum(-2, keepdims=True)
    return np.concatenate([total, np.zeros_like(total)], axis=-2)


def one_codec_each(
    figures: Figures, capacity: np.ndarray, given: Shares | None = None, elastic: bool = False
) -> Solution | None:
    """As `solve`, with one codec for each class and tier, as a policy has: the one with the largest share."""
    without: set[Column] = set()
    while (solution := solve(figures, capacity, given, without, elastic)) is not None:
        most: dict[tuple[str, Tier], Column] = {}
        for column in sorted(solution.shares, key=lambda c: solution.shares[c]):
            most[column[:2]] = column
        mixed = [c for c in solution.shares if most[c[:2]] != c]
        if not mixed:
            return solution
        for rival in mixed:
            without.update(c for c in figures.columns if c[:2] == rival[:2] and c != most[rival[:2]])
    return None
