"""The sizes of a measurement, and a stopwatch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flexgen.units import MIB

Clock = Callable[[], float]

_LEAST_SAMPLE = 0.01
"""The minimum seconds of one sample. Shorter work is repeated within a sample."""
_MOST_CALLS = 512
"""The maximum number of calls in one sample."""


@dataclass(frozen=True)
class Sampling:
    """The samples of one figure.

    repeats, seconds: the maximum number of samples, and the time after which three samples are enough.
    together: the seconds for which two lanes run together; each runs alone for half as long.
    """

    repeats: int = 9
    seconds: float = 0.3
    together: float = 0.75


@dataclass(frozen=True)
class Effort:
    """The sizes of a measurement, large enough not to fit in processor caches, and the samples of each figure.

    hidden, heads: the size of the measured layers. Their feed-forward half is four times as wide.
    working_set: the bytes of matrices, or of a KV cache, that are used before the first of them is used again.
    rows: the rows of activations.
    prompt, context: the tokens of a prompt and of a KV cache for attention.
    cache_rows: the prompts of the KV cache on the device.
    file, transfer: the bytes of the file on disk and of one transfer.
    layers, tokens: the size of the small model that measures the fixed cost of a cell.
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
    """Sizes for a GPU. With those for a CPU, its arithmetic would take less time than its launches."""
    return replace(
        effort,
        hidden=2 * effort.hidden,
        cache_rows=8 * effort.cache_rows,
        rows=(*effort.rows, 4 * effort.rows[-1]),  # far beyond the rows at which a CPU has its full speed
    )


FULL = Effort()
"""The effort of a full measurement."""


class Stopwatch:
    """Measures median times, with a clock that tests can replace."""

    def __init__(self, sampling: Sampling, clock: Clock = time.perf_counter) -> None:
        self._sampling = sampling
        self.clock = clock

    def seconds(self, work: Callable[[], object], settle: Callable[[], object] = lambda: None) -> float:
        """The seconds of one call of `work`, as the median of several samples. Short work has more samples.

        The first call is not counted. `settle` is called once per sample, to wait for work that a call has enqueued.
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
