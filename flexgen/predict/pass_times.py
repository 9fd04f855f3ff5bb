"""The seconds of all passes of a block in which rows end early, from those of a few of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexgen.predict.pass_timer import PassTimer, TimedPass
from flexgen.predict.refilled_passes import RefilledPass
from flexgen.results.trace import LaneName

_Kind = tuple[int, ...]
_Work = tuple[int, int]
"""The cached tokens that the attention of a pass reads, and the prompts that enter. The seconds of passes of one kind
are nearly linear in both."""


class PassTimes:
    """The seconds of passes. Of each kind, those with the least and the most work are timed, and the seconds of the
    others are interpolated.

    width: the tokens of a prompt. closes_up: see `Topology.closes_up`. timed: the passes that were timed.
    """

    def __init__(self, timer: PassTimer, passes: Sequence[RefilledPass], width: int, closes_up: bool) -> None:
        self._timer = timer
        self._width = width
        self._closes_up = closes_up
        self.timed: list[TimedPass] = []
        self._known: dict[_Kind, tuple[Plane, list[TimedPass]]] = {}
        kinds: dict[_Kind, list[RefilledPass]] = {}
        for one in passes:
            kinds.setdefault(self._kind(one), []).append(one)
        for kind, some in kinds.items():
            works = np.array([self._work(one) for one in some])
            ends = [some[n] for n in dict.fromkeys([*works.argmin(0).tolist(), *works.argmax(0).tolist()])]
            timed = [timer.time(one) for one in ends]
            self._known[kind] = Plane([self._work(one) for one in ends]), timed
            self.timed += timed

    def of(self, one: RefilledPass) -> tuple[float, dict[LaneName, float]]:
        """The seconds of a pass, and those of each lane alone."""
        plane, known = self._known[self._kind(one)]
        shares = plane.shares(self._work(one))
        seconds = float(shares @ [timed.seconds + one.cut * timed.ahead for timed in known])
        lanes = {
            lane: float(shares @ [timed.lanes.get(lane, 0.0) for timed in known]) for lane in known[-1].lanes
        }
        return seconds + one.moved * self._timer.token_copy, lanes

    def _work(self, one: RefilledPass) -> _Work:
        cells = zip(one.rows, one.tokens, strict=True)
        return one.cached_tokens(self._width), sum(rows for rows, token in cells if token <= 0)

    def _kind(self, one: RefilledPass) -> _Kind:
        """The kind of a pass. If rows close up, a cell may have any number of rows, so the kind then also has the
        first two binary digits of this number for each cell."""
        return *one.kind, *(map(_two_digits, one.rows) if self._closes_up else ())


class Plane:
    """Values at n points `at` (n, 2) as a linear function of the point, with the least squares of the errors.

    If the points are nearly on a line, the function does not change across it.
    """

    def __init__(self, at: Sequence[tuple[int, int]]) -> None:
        self._middle, self._scale = np.mean(at, axis=0), np.maximum(np.ptp(at, axis=0), 1)
        # Without rcond, noise in two values whose points nearly coincide would become a steep slope.
        self._inverse = np.linalg.pinv(np.insert((at - self._middle) / self._scale, 0, 1, axis=1), rcond=0.1)

    def shares(self, point: tuple[int, int]) -> np.ndarray:
        """(n,): the weights of the n values, whose weighted sum is the value at `point`."""
        return np.insert((point - self._middle) / self._scale, 0, 1) @ self._inverse


def _two_digits(count: int) -> int:
    """The number with zeros in place of all binary digits but the first two."""
    others = max(count.bit_length() - 2, 0)
    return count >> others << others
