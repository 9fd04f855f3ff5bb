"""Guesses of next tokens in a tuning: runs of the best policy with and without them, on prompts of the job.

The number of guesses that are right depends on the text that the model writes. So unlike other trials, these runs
have the job's own prompts and all layers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen.engine.model import OptLM
from flexgen.errors import FlexGenError
from flexgen.models import ModelSpec
from flexgen.policy import Policy
from flexgen.results.report import Report
from flexgen.search.choices import with_guesses
from flexgen.tuning.trial import warm_up

_log = logging.getLogger("flexgen")

_CLEARLY = 1.02
"""Guesses are chosen if runs with them are at least this number of times as fast. Runs differ by about that."""


@dataclass(frozen=True)
class GuessRuns:
    """The reports of runs that differ only in the number of guesses, by this number. One of them is 0."""

    runs: Mapping[int, Report]

    @property
    def best(self) -> int:
        """The number of guesses of the fastest run; 0 unless one with guesses is clearly faster."""
        fastest = max(self.runs, key=lambda guess: self.runs[guess].throughput_tokens_s)
        plain, most = (self.runs[guess].throughput_tokens_s for guess in (0, fastest))
        return fastest if most >= _CLEARLY * plain else 0

    @property
    def policy(self) -> Policy:
        """The policy of the best run."""
        return self.runs[self.best].policy

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data for JSON."""
        return {
            str(guess): {"tokens_s": run.throughput_tokens_s, "copied": run.copied}
            for guess, run in self.runs.items()
        }

    def __str__(self) -> str:
        plain, *others = self.runs.items()
        words = [
            f"{run.throughput_tokens_s:,.2f} with up to {guess} ({run.copied:.2f} tokens accepted a pass)"
            for guess, run in others
        ]
        return f"{plain[1].throughput_tokens_s:,.2f} tokens/s without guesses, {', '.join(words) or 'none tried'}"


def run_guesses(
    opening: Mapping[str, Any],
    policy: Policy,
    order: str | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> GuessRuns:
    """Run `policy` without guesses, then with each number of them that a search tries.

    opening: the other arguments of `OptLM`. prompts: the ids of each. tokens: the new tokens of each prompt, if it
    does not stop.

    Numbers of guesses that do not fit are left out. Raises the errors of `OptLM` and of `OptLM.generate` for the run
    without guesses.
    """
    plain = policy.replace(guess=0)
    report, spec = _run(opening, plain, order, prompts, tokens)
    runs = {0: report}
    for guessing in with_guesses(plain, spec):
        try:
            runs[guessing.guess], _ = _run(opening, guessing, order, prompts, tokens)
        except (FlexGenError, OSError) as error:
            _log.info("guess = %d is left out, it failed: %s", guessing.guess, error)
    return GuessRuns(runs)


def _run(
    opening: Mapping[str, Any],
    policy: Policy,
    order: str | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> tuple[Report, ModelSpec]:
    with OptLM(**opening, policy=policy, order=order) as model:
        warm_up(model, [np.asarray(prompt) for prompt in prompts], tokens)
        _, report = model.generate(prompts, tokens, stats=True)
        return report, model.spec
