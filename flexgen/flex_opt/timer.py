"""The timers of FlexGen 0.1: `timers("generate").costs` holds seconds, of the prefill and of each later token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flexgen.errors import RequestError
from flexgen.runtime.call import Timing

GENERATE = "generate"
"""The timer that `OptLM.generate` adds to."""
_COLD = 2
"""Later tokens that do not stand for those after them."""


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
        """Begin, after `sync_func`. Raises RequestError if it runs already."""
        if self._since is not None:
            raise RequestError(f"timer {self.name!r} runs already; stop it first")
        if sync_func is not None:
            sync_func()
        self._since = time.perf_counter()

    def stop(self, sync_func: Callable[[], object] | None = None) -> None:
        """End, after `sync_func`. Raises RequestError if it does not run."""
        if self._since is None:
            raise RequestError(f"timer {self.name!r} does not run; start it first")
        if sync_func is not None:
            sync_func()
        self.costs.append(time.perf_counter() - self._since)
        self._since = None

    def reset(self) -> None:
        """Forget all costs."""
        self.costs = []
        self._since = None

    def elapsed(self, mode: str = "average") -> float:
        """The mean of `costs`, or their "sum"; 0 without any."""
        if mode not in ("average", "sum"):
            raise RequestError(f"mode is {mode!r}; it must be 'average' or 'sum'")
        total = sum(self.costs)
        return total / len(self.costs) if self.costs and mode == "average" else total


class Timers:
    """Timers by name, made when they are first asked for."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, Timer(name))

    def __contains__(self, name: str) -> bool:
        return name in self.timers


timers = Timers()
"""Of the process, as in 0.1."""


def costs_of(timing: Timing, projected_to: int | None = None) -> list[float]:
    """Seconds of a call's prefill, then for each later token that ran the mean of them; as many as if
    `projected_to` tokens had run, if that is given."""
    ran = 1 + max(event.step.token for event in timing.trace.events)
    mean = timing.decode / max(ran - 1, 1)
    return [timing.prefill, *[mean] * ((projected_to or ran) - 1)]


def project_decode_latency(costs: Sequence[float], prompt_len: int, gen_len: int) -> float:
    """Seconds for the decode of `gen_len` new tokens, from the `costs` of the first few.

    Of the later tokens the first two count as they are; those that were not run take the mean of the others.
    `prompt_len` is not used, as in 0.1.
    """
    later = list(costs[1:gen_len])
    if not later:
        return 0.0
    like_the_rest = later[_COLD:] or later
    missing = gen_len - 1 - len(later)
    return sum(later) + missing * sum(like_the_rest) / len(like_the_rest)
