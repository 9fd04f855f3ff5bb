"""The ranking of the policies that a search has tried."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen.policy import Policy
from flexgen.predict.job import Job
from flexgen.search.programs import Solved
from flexgen.search.simulations import Run, Simulations

_OWN_ORDER = 0.01
"""The share of the time by which another order must be faster than the policy's own order. A policy file does not
store an order, so you have to pass it to every run."""


class Ranking:
    """The runs that were tried, with the program that each of them comes from.

    A run has two times. `seconds` is quick: for a large workload, it comes from a simulation of a few layers. The
    prediction of the whole model is exact. `score` and `whole_score` rank by them; smaller is better.
    """

    def __init__(self, job: Job, simulations: Simulations) -> None:
        self._job = job
        self._simulations = simulations
        self._programs: dict[Run, Solved] = {}
        self._seconds: dict[Run, float] = {}

    def __len__(self) -> int:
        return len(self._seconds)

    def __iter__(self) -> Iterator[Run]:
        """The runs, best `score` first."""
        return iter(sorted(self._seconds, key=self.score))

    def add(self, run: Run, program: Solved) -> bool:
        """Time a run, unless it has been tried before. Returns whether it is new."""
        new = run not in self._programs
        if new:
            self._programs[run] = program
            self._seconds[run] = self._simulations.seconds(run, program.figures)
        return new

    def add_improved(self, run: Run, origin: Run, seconds: float) -> None:
        """Add a run that was timed, with the program of the one from which it was made."""
        self._programs[run], self._seconds[run] = self._programs[origin], seconds

    def add_variant(self, run: Run, origin: Run) -> None:
        """Give a variant the program of the run from which it was made. It is not ranked by `score`."""
        self._programs[run] = self._programs[origin]

    def program(self, run: Run) -> Solved:
        """The program that a run comes from."""
        return self._programs[run]

    def seconds(self, run: Run) -> float:
        """The quick time of a run."""
        return self._seconds[run]

    @property
    def least_seconds(self) -> float:
        """The shortest quick time."""
        return min(self._seconds.values())

    def shapes(self) -> list[Solved]:
        """The program of the best run of each form, best first."""
        best: dict[Policy, Solved] = {}
        for run in self:
            best.setdefault(self._programs[run].form, self._programs[run])
        return list(best.values())

    def score(self, run: Run) -> float:
        """The quick time, with the handicap of the run's order."""
        return self._seconds[run] * self._handicap(run)

    def whole_score(self, run: Run) -> float:
        """As `score`, for the prediction of the whole model."""
        return self.predicted(run) * self._handicap(run)

    def predicted(self, run: Run) -> float:
        """The predicted seconds of the whole model."""
        return self._simulations.prediction(run).report.total_s

    def _handicap(self, run: Run) -> float:
        """Above 1 if the order is not the policy's own."""
        return 1.0 if run.order in (None, self._job.order) else 1 + _OWN_ORDER
