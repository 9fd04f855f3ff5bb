"""The sizes of a measurement, and how a time is taken."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flexgen.units import MIB

Clock = Callable[[], float]

_LEAST_SAMPLE = 0.01
"""Seconds of one sample: shorter work is repeated within it."""
_MOST_CALLS = 512
"""Within one sample."""


@dataclass(frozen=True)
class Sampling:
    """How often each time is taken: at most `repeats` samples, in about `seconds`. `together`: seconds for which two
    lanes run at the same time, and half as long alone."""

    repeats: int = 9
    seconds: float = 0.3
    together: float = 0.75


@dataclass(frozen=True)
class Effort:
    """Sizes large enough to leave the caches, and the samples of each time.

    `hidden`, `heads`: of the layers that are computed, whose feed-forward half is four times as wide. `working_set`:
    bytes of matrices, or of a cache, that are read before the first of them is read again. `rows`: those of the
    activations. `prompt`: tokens of a prompt. `context`, `cache_rows`: tokens and prompts of the cache on the device.
    `file`, `transfer`: bytes of the file on disk and of each move. `layers`, `tokens`: of the small model
    that shows the time of a cell in addition to its arithmetic.
    """

    hidden: int = 2048
    heads: int = 32
    working_set: int = 256 * MIB
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
    prompt: int = 256
    context: int = 512
    cache_rows: int = 8
    file: int = 256 * MIB
    transfer: int = 32 * MIB
    layers: int = 8
    tokens: int = 24
    sampling: Sampling = Sampling()


def on_gpu(effort: Effort) -> Effort:
    """Sizes for a GPU, whose arithmetic would otherwise take less time than its launches."""
    return replace(
        effort,
        hidden=2 * effort.hidden,
        cache_rows=8 * effort.cache_rows,
        rows=(*effort.rows, 4 * effort.rows[-1]),  # where a CPU has long reached its full rate
    )


FULL = Effort()
"""What a machine is measured with."""


class Stopwatch:
    """Median times of work, on a clock that tests replace."""

    def __init__(self, sampling: Sampling, clock: Clock = time.perf_counter) -> None:
        self._sampling = sampling
        self.clock = clock

    def seconds(self, work: Callable[[], object], settle: Callable[[], object] = lambda: None) -> float:
        """One call of `work`: the median of samples, of which there are more where they are short.

        The first call is not counted. `settle` waits for what a call has only enqueued, once a sample.
        """
        work()
        settle()
        first = self._sample(work, settle, 1)
        calls = min(max(math.ceil(_LEAST_SAMPLE / first), 1), _MOST_CALLS) if first > 0 else _MOST_CALLS
        samples = [first] if calls == 1 else []
        spent = first
        most, seconds = self._sampling.repeats, self._sampling.seconds
        while len(samples) < most and (len(samples) < 3 or spent < seconds):
            samples.append(self._sample(work, settle, calls))
            spent += samples[-1] * calls
        return max(statistics.median(samples), 1e-9)

    def _sample(self, work: Callable[[], object], settle: Callable[[], object], calls: int) -> float:
        began = self.clock()
        for _ in range(calls):
            work()
        settle()
        return (self.clock() - began) / calls
