"""How a benchmark and its workers talk: one process per engine, one JSON per line.

A worker may run in an environment of its own, so this module needs numpy only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def prompt_ids(batch: int, length: int) -> np.ndarray:
    """The token ids of all engines, as (batch, length)."""
    return np.random.default_rng(0).integers(4, 30_000, size=(batch, length))


def ragged_prompts(work: dict[str, Any]) -> tuple[list[np.ndarray], list[int]]:
    """The prompts of a job, and the number of new tokens of each.

    All prompts begin with the same `prefix` ids. `own` is the smallest and the largest number of the other ids of a
    prompt. The numbers of new tokens are geometric with the mean `mean_new`, and `gen_len` at most.
    """
    rng, count = np.random.default_rng(0), work["prompts"]
    shared = rng.integers(4, 30_000, size=work["prefix"])
    least, most = work["own"]
    lengths = rng.integers(least, most + 1, size=count)
    prompts = [np.concatenate([shared, rng.integers(4, 30_000, size=length)]) for length in lengths]
    return prompts, rng.geometric(1 / work["mean_new"], size=count).clip(1, work["gen_len"]).tolist()


_answers: list[int] = []  # the original standard output, after `job`


def job() -> dict[str, Any]:
    """The job of this process: its first argument.

    From here on, what libraries print to standard output goes to standard error: vLLM logs while it opens a model.
    """
    _answers.append(os.dup(1))
    os.dup2(2, 1)
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def serve(opened: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Report `opened`, then call `run` and report its result for each line of standard input.

    Call `job` before. Reports go to the original standard output.
    """
    with os.fdopen(_answers.pop(), "w") as answers:
        print(json.dumps(opened), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(run()), file=answers, flush=True)
