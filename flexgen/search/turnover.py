"""How often a block computes its batches in a job whose rows end early and make room for other prompts.

The passes are those of the prediction (`predict/refill.py`), for a similar job of few and short rows: the share of
the places that are in use depends on the number of batches and on the distribution of the answers, and hardly on the
rows of a batch or on the unit of the lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flexgen.layout.passes import Passes
from flexgen.policy import Policy
from flexgen.predict.refilled_passes import refilled_passes
from flexgen.workload import Workload

_PLACES = 128
"""Blocks with more places than this are simulated with fewer rows in a batch, but at least `_FEWEST`. With few rows,
the longest answer of a block is shorter than that of the job."""
_FEWEST = 4
_LONGEST = 64
"""The longest answers that are simulated. Longer ones are represented by a fraction of their length."""
_LEAST_MEAN = 8
"""The lowest mean to which answers are shortened. With a lower one, their distribution would be another."""
_TIMED = 5
"""The number of passes that a prediction lays out for each kind of pass: two, each with one or two others."""
_BLOCKS = 4
"""The number of blocks of prompts with the longest answers that is simulated. Further ones take as long as the last
two of these."""


@dataclass(frozen=True)
class Turnover:
    """The passes of a job, in all of which the batches that have rows run.

    entering: the number of those in which prompts enter and no batch decodes. passes: the number of the others.
    cells: the number of batches that decode, summed over passes. token: the mean of the tokens of these batches, as
    in `Passes`. timed: the number of cells of a layer that a prediction times.
    """

    entering: float
    passes: float
    cells: float
    token: float
    timed: int


def turnover(workload: Workload, policy: Policy) -> Turnover:
    """The turnover of a workload in which prompts enter (`refills`), and of policies of this shape."""
    batches = policy.num_gpu_batches
    rows = min(policy.gpu_batch_size, max(_PLACES // batches, _FEWEST))
    # With guesses, a row needs fewer passes.
    in_pass = workload.tokens_in_pass(policy.guess)
    longest = 1 + (workload.gen_len - 1) / in_pass
    mean = 1 + ((workload.mean_new or workload.gen_len) - 1) / in_pass
    unit = max(min(longest / _LONGEST, mean / _LEAST_MEAN), 1.0)
    short = max(round(longest / unit), 1)
    answers = short, min(max(mean / unit, 1.0), short)
    blocks = workload.num_prompts / policy.block_size
    places = rows * batches
    rate = math.ceil(policy.prefill_rows * unit * rows / policy.gpu_batch_size)
    shape = Policy(gpu_batch_size=rows, num_gpu_batches=batches, prefill_rows=rate, guess=policy.guess)
    width = Passes.of(workload, policy).width

    def simulated(blocks: float) -> tuple[np.ndarray, int]:
        return _simulated(shape, max(round(blocks * places), 1), width, *answers)

    most = _BLOCKS * max(_LONGEST // short, 1)
    found, timed = simulated(min(blocks, most))
    if blocks > most:
        found = found + (blocks - most) / 2 * (found - simulated(most - 2)[0])
    entering, passes, cells, tokens = map(float, found)
    token = unit * tokens / cells if cells else 0.0
    return Turnover(entering, unit * passes, unit * cells, token, timed)


@lru_cache(maxsize=4096)
def _simulated(
    policy: Policy, prompts: int, width: int, gen_len: int, mean_new: float
) -> tuple[np.ndarray, int]:
    """(4,): the figures of `Turnover`, with the sum of the tokens instead of their mean. And `Turnover.timed`."""
    answers = Workload(1, gen_len, prompts, mean_new=mean_new).answers()
    total, kinds = np.zeros(4), dict[tuple[object, ...], int]()
    passes = Passes(width, rows=policy.prefill_rows, batches=policy.num_gpu_batches)
    for one in refilled_passes(answers, policy, passes):
        decoding = [token for token in one.tokens if token > 0]
        total += not decoding, bool(decoding), len(decoding), sum(decoding)
        kinds[one.kind] = len(one.tokens)
    return total, _TIMED * sum(kinds.values())
