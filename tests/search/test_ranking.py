"""The ranking of runs, with times of their own."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexgen import Policy
from flexgen.search.ranking import Ranking
from flexgen.search.simulations import Run

SMALL, LARGE = Policy(gpu_batch_size=1), Policy(gpu_batch_size=2)


class Times:
    """Simulations in which a run takes the given seconds, and twice as many for the whole model."""

    def __init__(self, seconds: dict[Run, float]) -> None:
        self._seconds = seconds
        self.timed: list[Run] = []

    def seconds(self, run: Run, figures: object) -> float:
        self.timed.append(run)
        return self._seconds[run]

    def prediction(self, run: Run) -> Any:
        return SimpleNamespace(report=SimpleNamespace(total_s=2 * self._seconds[run]))


def program(policy: Policy) -> Any:
    return SimpleNamespace(form=policy, figures=None)


def ranking(seconds: dict[Run, float], order: str | None = None) -> tuple[Any, Times]:
    times = Times(seconds)
    ranked: Any = Ranking(SimpleNamespace(order=order), times)  # type: ignore[arg-type]
    for run in seconds:
        ranked.add(run, program(run.policy))
    return ranked, times


def test_another_order_must_save_one_percent() -> None:
    own = Run(SMALL)
    for seconds, best in ((9.95, own), (9.85, Run(SMALL, "normal"))):
        ranked, _ = ranking({own: 10.0, Run(SMALL, "normal"): seconds})
        assert next(iter(ranked)) == best
        assert min(ranked, key=ranked.whole_score) == best
        assert ranked.least_seconds == seconds


def test_the_order_of_the_job_has_no_handicap() -> None:
    ranked, _ = ranking({Run(SMALL, "normal"): 10.0}, order="normal")
    assert ranked.score(Run(SMALL, "normal")) == 10.0
    assert ranked.whole_score(Run(SMALL, "normal")) == ranked.predicted(Run(SMALL, "normal")) == 20.0


def test_a_run_is_timed_once() -> None:
    ranked, times = ranking({Run(SMALL): 1.0})
    assert not ranked.add(Run(SMALL), program(LARGE))
    assert times.timed == [Run(SMALL)] and len(ranked) == 1
    assert ranked.program(Run(SMALL)).form == SMALL


def test_shapes_are_those_of_the_best_runs() -> None:
    ranked, _ = ranking({Run(SMALL): 3.0, Run(LARGE): 2.0, Run(LARGE, "normal"): 1.0})
    assert [one.form for one in ranked.shapes()] == [LARGE, SMALL]


def test_improved_runs_and_variants_keep_the_program_of_their_origin() -> None:
    ranked, times = ranking({Run(SMALL): 3.0})
    better, variant = Run(SMALL.replace(guess=1)), Run(SMALL.replace(guess=2))
    ranked.add_improved(better, Run(SMALL), 2.0)
    ranked.add_variant(variant, better)
    assert list(ranked) == [better, Run(SMALL)]
    assert ranked.seconds(better) == 2.0 and times.timed == [Run(SMALL)]
    assert ranked.program(variant) is ranked.program(better) is ranked.program(Run(SMALL))
    with pytest.raises(KeyError):
        ranked.seconds(variant)
