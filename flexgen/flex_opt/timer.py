"""The timers of FlexGen 0.1: `timers("generate").costs` has the seconds of the prefill and of each later token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flexgen.errors import RequestError
from flexgen.runtime.call import Timing

GENERATE = "generate"
"""The timer that `OptLM.generate` adds to."""
_COLD = 2
"""The number of later tokens that are not representative of the following ones."""


class Timer:
    """Seconds between `start` and `stop`, one entry in `costs` for each pair."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.costs: list[float] = []
        self._since: float | None = None

    @property
    def started(self) -> bool:
        return self._since is not None

    def start(self, sync_func: Callable[[], object] | None = None) -> None:
        """Call `sync_func`, then start. Raises RequestError if the timer is running."""
        if self._since is not None:
            raise RequestError(f"timer {self.name!r} is running; stop it first")
        if sync_func is not None:
            sync_func()
        self._since = time.perf_counter()

    def stop(self, sync_func: Callable[[], object] | None = None) -> None:
        """Call `sync_func`, then stop. Raises RequestError if the timer is not running."""
        if self._since is None:
            raise RequestError(f"timer {self.name!r} is not running; start it first")
        if sync_func is not None:
            sync_func()
        self.costs.append(time.perf_counter() - self._since)
        self._since = None

    def reset(self) -> None:
        """Remove all costs."""
        self.costs = []
        self._since = None

    def elapsed(self, mode: str = "average") -> float:
        """The mean of `costs`, or their sum with `mode="sum"`; 0 if there are none."""
        if mode not in ("average", "sum"):
            raise RequestError(f"mode is {mode!r}; it must be 'average' or 'sum'")
        total = sum(self.costs)
        return total / len(self.costs) if self.costs and mode == "average" else total


class Timers:
    """Timers by name, created on first use."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, Timer(name))

    def __contains__(self, name: str) -> bool:
        return name in self.timers


timers = Timers()
"""The timers of the process, as in 0.1."""


def costs_of(timing: Timing, projected_to: int | None = None) -> list[float]:
    """The seconds of a call's prefill, then the mean decode time for each later token.

    projected_to: the number of tokens to return costs for, if not the number that ran.
    """
    ran = 1 + max(event.step.token for event in timing.trace.events)
    mean = timing.decode / max(ran - 1, 1)
    return [timing.prefill, *[mean] * ((projected_to or ran) - 1)]


def project_decode_latency(costs: Sequence[float], prompt_len: int, gen_len: int) -> float:
    """The decode time of `gen_len` new tokens in seconds, extrapolated from the `costs` of the first few.

    A token that did not run gets the mean of the later tokens without the first two. `prompt_len` is unused, as in
    0.1.
    """
    later = list(costs[1:gen_len])
    if not later:
        return 0.0
    like_the_rest = later[_COLD:] or later
    missing = gen_len - 1 - len(later)
    return sum(later) + missing * sum(like_the_rest) / len(like_the_rest)
