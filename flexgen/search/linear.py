"""Placement as a linear program: the seconds of every lane and the bytes of every tier are, up to rounding, affine
in the shares of a policy.

`corners` makes the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexgen.policy import Policy, Tier
from flexgen.results.trace import LaneName

CLASSES = "weights", "cache", "activations"
LANES = tuple(LaneName)
LANE_ROW = {lane: row for row, lane in enumerate(LANES)}

IN_TURN = len(LANES)
"""The row of what a batch has to do one after the other: its hidden states in, its computation, and out again."""
UNHIDDEN = len(LANES) + 1
"""The row of computation and of weights that it cannot hide, for want of a second slot."""
ROWS = len(LANES) + 2
_OTHER_LANES = 0.01
"""What a second of a lane that nothing waits for is held to cost: of placements that are equally fast the one that
moves less is taken, because no order overlaps perfectly."""


class Column(NamedTuple):
    """One way to keep all of a class of data."""

    what: str  # weights, cache, activations
    tier: Tier
    codec: str = "none"


Shares = Mapping[Column, float]
"""What part of its class each column has, 0 to 1."""


def shares_of(policy: Policy) -> Shares:
    """The shares of a policy's classes, by where and in what form they are kept."""
    splits = {"weights": policy.weights, "cache": policy.cache, "activations": policy.activations}
    return {
        Column(what, tier, split[tier].codec): split.percent(tier) / 100
        for what, split in splits.items()
        for tier in Tier
        if split.percent(tier)
    }


@dataclass(frozen=True)
class Figures:
    """Seconds by phase and row (2, rows) and bytes by tier (3,) of a block, affine in the shares.

    `base`: where each class is on its first column. `change`: by column, what it adds if it has all of its class.
    """

    columns: tuple[Column, ...]
    base: np.ndarray
    change: np.ndarray  # (columns, 2 * rows + 3)
    serial: bool  # steps wait for one another, whatever their lane

    def at(self, shares: Shares) -> np.ndarray:
        part = np.array([shares.get(column, 0.0) for column in self.columns])
        return np.asarray(self.base + part @ self.change)

    def seconds(self, shares: Shares) -> list[dict[LaneName, float]]:
        """Of prefill and decode, by lane alone."""
        return [dict(zip(LANES, row.tolist(), strict=False)) for row in self.at(shares)[:-3].reshape(2, ROWS)]

    def of_lane(self, phase: int, lane: LaneName, shares: Shares) -> dict[str, float]:
        """The seconds that each class puts on a lane beyond what it would on the tier where it asks least of it."""
        row = phase * ROWS + LANES.index(lane)
        asks = dict(zip(self.columns, self.change[:, row], strict=True))
        return {
            what: sum(shares.get(c, 0.0) * asks[c] for c in asks if c.what == what)
            - min(asks[c] for c in asks if c.what == what)
            for what in CLASSES
        }


@dataclass(frozen=True)
class Solution:
    """`seconds` of prefill and decode together, and what a byte more of each tier would save."""

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
    """The shares with the shortest prefill and decode, within `capacity` (bytes by tier); None if nothing fits.

    given: shares that are settled. without: columns that get nothing. elastic: capacities may be exceeded, by as
    few bytes as can be.
    """
    from scipy.optimize import linprog  # takes a while to import, and only a search solves programs

    n, without = len(figures.columns), set(without)
    seconds = figures.base[:-3].reshape(2, ROWS)
    rows = figures.change[:, :-3].reshape(n, 2, ROWS)
    if figures.serial:  # each lane waits for the others
        seconds, rows = seconds[:, : len(LANES)], rows[:, :, : len(LANES)]
        limits_seconds, limits_rows = seconds.sum(1, keepdims=True), rows.sum(2, keepdims=True)
    else:
        limits_seconds, limits_rows = seconds, rows
    unit = max(float(np.abs(figures.base[:-3]).max()), float(np.abs(figures.change[:, :-3]).max()), 1e-12)
    width = limits_seconds.shape[1]
    # Variables: the shares, then the seconds of prefill and decode, in `unit`, then what is too much on each tier.
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


def one_codec_each(
    figures: Figures, capacity: np.ndarray, given: Shares | None = None, elastic: bool = False
) -> Solution | None:
    """As `solve`, with one codec for each class and tier, as a policy has: that which had most of it."""
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
