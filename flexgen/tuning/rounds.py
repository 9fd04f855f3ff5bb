"""Search, try, correct the machine's figures by what the trials took, and search again.

`python -m flexgen.tune` is the command around it.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexgen.engine.auto import in_words
from flexgen.errors import FlexGenError, RequestError
from flexgen.policy import Auto
from flexgen.predict.job import Job
from flexgen.results.report import Report
from flexgen.search.find import Candidate, Search, find_for_job
from flexgen.tuning.correct import Seen, corrected
from flexgen.tuning.trial import Shape, predicted_trial, run_trial, shape_for
from flexgen.workload import Workload

_log = logging.getLogger("flexgen")

_STEADY = 0.1
"""Repeats whose totals are within this share of their median are a stable figure."""


@dataclass
class Tried:
    """A candidate of the search and its trials.

    `full` is predicted of the whole job before any correction, `predicted` of the trial. The whole job is taken to
    be as many times longer than predicted as the trial was, prefill and decode each.
    """

    candidate: Candidate
    shape: Shape
    full: Report
    predicted: Report
    runs: list[Report] = field(default_factory=list)
    failure: str = ""

    @property
    def spread(self) -> float:
        """Largest difference between the repeats, as a share of their median."""
        totals = [report.total_s for report in self.runs]
        return (max(totals) - min(totals)) / statistics.median(totals)

    @property
    def measured(self) -> Report:
        """The whole job, projected from the median of the trials."""
        prefill = statistics.median(report.prefill_s for report in self.runs)
        decode = statistics.median(report.decode_s for report in self.runs)
        return replace(
            self.full,
            prefill_s=self.full.prefill_s * prefill / self.predicted.prefill_s,
            decode_s=self.full.decode_s
            * (decode / self.predicted.decode_s if self.predicted.decode_s else 1),
        )

    def seen(self) -> Seen:
        """For the correction of the machine's figures."""
        (timed,) = (report for report in self.runs if report.phases)
        return Seen(
            self.candidate.policy,
            timed.dtype,
            self.shape.workload.prompt_len,
            timed.phases,
            self.predicted.phases,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures: dict[str, Any] = {
            "policy": self.candidate.policy.to_dict(),
            "order": self.candidate.order,
            "trial": str(self.shape),
            "predicted_tokens_s": self.full.throughput_tokens_s,
        }
        if not self.runs:
            return figures | ({"failure": self.failure} if self.failure else {})
        return figures | {
            "measured_tokens_s": self.measured.throughput_tokens_s,
            "spread": self.spread,
            "trial_s": [report.total_s for report in self.runs],
            "trial_predicted_s": self.predicted.total_s,
        }


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    top: candidates of a round. rounds: at most. repeats: runs of each candidate, twice as many where they differ.
    trial_seconds: of one run, about. seed: of the ids.
    """

    top: int = 3
    rounds: int = 3
    repeats: int = 3
    trial_seconds: float = 10.0
    seed: int = 0


class Tuning:
    """The rounds of one tuning: what was tried, and the machine's figures as far as they are corrected.

    job: with the machine's figures before any correction. auto: the given fields of a policy. opening: the arguments
    of `OptLM` for a trial, but for the policy and the order. Progress is logged.
    """

    def __init__(self, job: Job, auto: Auto, effort: Effort, opening: Mapping[str, Any]) -> None:
        self._job = job
        self._auto = auto
        self._effort = effort
        self._opening = opening
        self.workload = job.workload
        self.hardware = job.hardware
        self.tried: list[Tried] = []
        self.search = self.find(self.workload)
        _log.info("%s", in_words(self.search))

    def find(self, workload: Workload) -> Search:
        """Search with the figures as they are now."""
        job = replace(self._job, hardware=self.hardware).for_workload(workload)
        return find_for_job(job, self._auto, self._effort.top)

    @property
    def best(self) -> Tried | None:
        """The fastest of those that ran."""
        ran = [tried for tried in self.tried if tried.runs]
        return max(ran, key=lambda tried: tried.measured.throughput_tokens_s, default=None)

    def run(self) -> None:
        """Try, correct and search again until the search finds nothing better that was not tried."""
        effort = self._effort
        for n in range(effort.rounds):
            new = [candidate for candidate in self._candidates() if self._is_new(candidate)]
            if n and (not new or not self._is_new(self.search.best)):
                return
            new = new[: effort.top]
            _log.info(
                f"round {n + 1} of at most {effort.rounds}: {len(new)} candidates, {effort.repeats} runs each of "
                f"about {effort.trial_seconds:g} s, a part of the job"
            )
            self._try(new)
            if not any(tried.runs for tried in self.tried):
                why = "; ".join(sorted({tried.failure for tried in self.tried}))
                raise RequestError(f"none of {len(self.tried)} candidates ran: {why}")
            self.hardware = corrected(
                self._job.hardware, [tried.seen() for tried in self.tried if tried.runs]
            )
            self.search = self.find(self.workload)
            _log.info(f"with the figures corrected, {in_words(self.search)}")

    def _candidates(self) -> list[Candidate]:
        return [self.search.best, *self.search.runners_up]

    def _is_new(self, candidate: Candidate) -> bool:
        asked = candidate.policy, candidate.order
        return all((tried.candidate.policy, tried.candidate.order) != asked for tried in self.tried)

    def _try(self, candidates: Sequence[Candidate]) -> None:
        """Run every candidate once, and again, so that a drift of the machine meets all of them alike."""
        new = [self._planned(candidate) for candidate in candidates]
        self.tried += new
        repeats = self._effort.repeats
        for repeat in range(repeats):
            for tried in new:
                self._run(tried, repeat)
        unsteady = [tried for tried in new if tried.runs and tried.spread > _STEADY]
        for repeat in range(repeats, 2 * repeats):
            for tried in unsteady:
                self._run(tried, repeat)

    def _planned(self, candidate: Candidate) -> Tried:
        policy, job = candidate.policy, replace(self._job, order=candidate.order)
        shape = shape_for(job, policy, self._effort.trial_seconds)
        predicted = predicted_trial(job, policy, shape)
        # The whole job, with the figures that the trial is predicted with.
        whole = predicted_trial(job, policy, Shape(job.spec.num_layers, self.workload))
        return Tried(candidate, shape, whole, predicted)

    def _run(self, tried: Tried, repeat: int) -> None:
        if tried.failure:
            return
        policy, order = tried.candidate.policy, tried.candidate.order
        try:
            report = run_trial(
                self._opening, policy, order, tried.shape, lanes=not repeat, seed=self._effort.seed
            )
        except (FlexGenError, OSError) as error:
            tried.failure = str(error)
            tried.runs.clear()
            _log.info(f"{words(tried.candidate)}: left out, it failed: {error}")
            return
        tried.runs.append(report)
        _log.info(
            f"{words(tried.candidate)}: {tried.shape} in {report.total_s:.3g} s, "
            f"predicted {tried.predicted.total_s:.3g} s"
        )


def words(candidate: Candidate) -> str:
    """A policy and its order in a few words."""
    policy = candidate.policy
    parts = [f"{policy.num_gpu_batches} x {policy.gpu_batch_size}", candidate.order]
    for name in ("weights", "cache", "activations"):
        split = getattr(policy, name)
        shares = (
            f"{split.percent(tier):.0f}% {tier}" for tier in ("gpu", "cpu", "disk") if split.percent(tier)
        )
        parts.append(f"{name} {' '.join(shares)}")
    return ", ".join(parts)


def trials_table(tried: Sequence[Tried]) -> str:
    """A line for each candidate, the fastest first."""
    rows = []
    for one in sorted(tried, key=lambda t: -t.measured.throughput_tokens_s if t.runs else 0.0):
        measured = (
            f"{one.measured.throughput_tokens_s:10.2f} {one.spread:7.0%}"
            if one.runs
            else f"{'failed' if one.failure else 'not run':>18}"
        )
        rows.append(f"{one.full.throughput_tokens_s:10.2f} {measured}  {words(one.candidate)}")
    return "\n".join([f"{'predicted':>10} {'measured':>10} {'spread':>7}  tokens/s of the whole job", *rows])
