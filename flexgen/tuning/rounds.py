"""Rounds of tuning: search, run trials, correct the machine's figures with the trials' times, and search again.

`python -m flexgen.tune` is the command for it.
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
from flexgen.search.candidates import Candidate, Search
from flexgen.search.find import find_for_job
from flexgen.tuning.correct import Seen, corrected
from flexgen.tuning.guesses import GuessRuns, run_guesses
from flexgen.tuning.trial import Shape, predicted_trial, run_trial, shape_for
from flexgen.workload import Workload

_log = logging.getLogger("flexgen")

_LEAST_COPIED = 16
"""New tokens that show how much of the text is copied."""

_STEADY = 0.1
"""The maximum spread of repeats, as a share of their median. With a larger spread, there are more repeats."""


@dataclass
class Tried:
    """A candidate of the search and its trials.

    The measured time of the whole job is projected: its predicted prefill and decode are multiplied by the ratio of
    measured to predicted time of the trial.

    shape: the part of the job that a trial runs.
    full: the prediction of the whole job, with uncorrected figures.
    predicted: the prediction of the trial, with uncorrected figures.
    runs: the reports of the trials.
    failure: the error of a trial; empty if none failed.
    """

    candidate: Candidate
    shape: Shape
    full: Report
    predicted: Report
    runs: list[Report] = field(default_factory=list)
    failure: str = ""

    @property
    def spread(self) -> float:
        """The largest difference between the repeats, as a share of their median."""
        totals = [report.total_s for report in self.runs]
        return (max(totals) - min(totals)) / statistics.median(totals)

    @property
    def measured(self) -> Report:
        """The report of the whole job, projected from the median of the trials."""
        prefill = statistics.median(report.prefill_s for report in self.runs)
        decode = statistics.median(report.decode_s for report in self.runs)
        return replace(
            self.full,
            prefill_s=self.full.prefill_s * prefill / self.predicted.prefill_s,
            decode_s=self.full.decode_s
            * (decode / self.predicted.decode_s if self.predicted.decode_s else 1),
        )

    def seen(self) -> Seen:
        """The run and its prediction, for the correction of the machine's figures."""
        (timed,) = (report for report in self.runs if report.phases)
        return Seen(
            self.candidate.policy,
            timed.dtype,
            self.shape.workload.prompt_len,
            timed.phases,
            self.predicted.phases,
        )

    def to_dict(self) -> dict[str, Any]:
        """The candidate and its trials as plain data for JSON."""
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
    """The effort of a tuning.

    top: the number of candidates in a round.
    rounds: the maximum number of rounds.
    repeats: the number of runs of each candidate; it is doubled if their times differ.
    trial_seconds: the approximate time of one run.
    seed: the seed of the random ids.
    """

    top: int = 3
    rounds: int = 3
    repeats: int = 3
    trial_seconds: float = 10.0
    seed: int = 0


class Tuning:
    """The rounds of one tuning: the tried candidates, and the corrected figures of the machine. Progress is logged.

    job: the job, with the machine's uncorrected figures.
    auto: the given fields of a policy.
    effort: the number and the length of the trials.
    opening: the arguments of `OptLM` for a trial, except policy and order.
    """

    def __init__(self, job: Job, auto: Auto, effort: Effort, opening: Mapping[str, Any]) -> None:
        self._job = job
        self._auto = auto
        self._effort = effort
        self._opening = opening
        self.workload = job.workload
        self.hardware = job.hardware
        self.tried: list[Tried] = []
        self.guesses: GuessRuns | None = None
        """The runs of the best policy with guesses; None if none was tried."""
        self.search = self.find(self.workload)
        _log.info("%s", in_words(self.search))

    def find(self, workload: Workload) -> Search:
        """Search with the current figures."""
        job = replace(self._job, hardware=self.hardware).for_workload(workload)
        return find_for_job(job, self._auto, self._effort.top)

    @property
    def best(self) -> Tried | None:
        """The fastest candidate that ran, or None."""
        ran = [tried for tried in self.tried if tried.runs]
        return max(ran, key=lambda tried: tried.measured.throughput_tokens_s, default=None)

    def run(self) -> None:
        """Try candidates, correct the figures and search again, until the best candidate is one that was tried.

        Raises RequestError if no candidate runs.
        """
        effort = self._effort
        for n in range(effort.rounds):
            new = [candidate for candidate in self._candidates() if self._is_new(candidate)]
            if n and (not new or not self._is_new(self.search.best)):
                return
            new = new[: effort.top]
            _log.info(
                f"round {n + 1} of at most {effort.rounds}: {len(new)} candidates, each with {effort.repeats} runs "
                f"of a part of the job, about {effort.trial_seconds:g} s per run"
            )
            self._try(new)
            if not any(tried.runs for tried in self.tried):
                why = "; ".join(sorted({tried.failure for tried in self.tried}))
                raise RequestError(
                    f"none of the {len(self.tried)} candidate policies ran: {why}. Free memory, lower gen_len or the "
                    "number of prompts, or give a policy of your own"
                )
            self.hardware = corrected(
                self._job.hardware, [tried.seen() for tried in self.tried if tried.runs]
            )
            self.search = self.find(self.workload)
            _log.info(f"with corrected figures, {in_words(self.search)}")

    def try_guesses(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run the best policy with and without guesses, on one block of the job's own prompts (ids).

        The runs have fewer new tokens than the job, so that the predicted time of one is at most that of a trial, but
        at least `_LEAST_COPIED`. Raises RequestError if a run without guesses fails.
        """
        best = self.best
        if best is None or "guess" in self._auto.fixed:
            return
        policy, order = best.candidate.policy, best.candidate.order
        block = [prompts[n % len(prompts)] for n in range(min(policy.block_size, self.workload.num_prompts))]
        tokens = min(_LEAST_COPIED, self.workload.gen_len)
        job = replace(self._job, order=order)
        while tokens < self.workload.gen_len:
            more = min(2 * tokens, self.workload.gen_len)
            part = replace(self.workload, num_prompts=len(block), gen_len=more, mean_new=None)
            took = predicted_trial(job, policy, Shape(job.spec.num_layers, part)).total_s
            if took > self._effort.trial_seconds:
                break
            tokens = more
        _log.info(f"runs with and without guesses: {tokens} new tokens of {len(block)} prompts of the job")
        self.guesses = run_guesses(self._opening, policy, order, block, tokens)
        _log.info("%s", self.guesses)

    def _candidates(self) -> list[Candidate]:
        return [self.search.best, *self.search.runners_up]

    def _is_new(self, candidate: Candidate) -> bool:
        asked = candidate.policy, candidate.order
        return all((tried.candidate.policy, tried.candidate.order) != asked for tried in self.tried)

    def _try(self, candidates: Sequence[Candidate]) -> None:
        """Run all candidates in turn, repeatedly, so that a drift of the machine affects all of them equally."""
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
        # The prediction of the whole job uses the same figures as that of the trial.
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
    """A policy and its order in one line."""
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
    """A table with a line for each candidate, the fastest first."""
    rows = []
    for one in sorted(tried, key=lambda t: -t.measured.throughput_tokens_s if t.runs else 0.0):
        measured = (
            f"{one.measured.throughput_tokens_s:10.2f} {one.spread:7.0%}"
            if one.runs
            else f"{'failed' if one.failure else 'not run':>18}"
        )
        rows.append(f"{one.full.throughput_tokens_s:10.2f} {measured}  {words(one.candidate)}")
    return "\n".join([f"{'predicted':>10} {'measured':>10} {'spread':>7}  tokens/s of the whole job", *rows])
