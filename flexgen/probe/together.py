"""The slowdown of lanes that work at the same time: they share cores, memory bandwidth or the queue of a disk."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator

import torch

from flexgen.memory import threads
from flexgen.probe.effort import Clock

Work = Callable[[], object]

_ROUNDS = 3
"""Rounds of each measurement (both alone, then together). The speed of a shared machine changes every second."""


def lost_shares(here: Work, there: Work, seconds: float, clock: Clock) -> tuple[float, float]:
    """The share of its speed, from 0 to below 1, that each of two kinds of work loses while the other runs.

    `here` runs in this thread and `there` in another one. Both run together for `seconds` in total; each runs alone
    for half as long just before. The result is the median of all rounds.
    """
    found = [_lost(here, there, seconds / _ROUNDS, clock) for _ in range(_ROUNDS)]
    first, second = (min(max(statistics.median(shares), 0.0), 0.95) for shares in zip(*found, strict=True))
    return first, second


def meanwhile(here: Work, there: Callable[[], float], count: int) -> list[float]:
    """Call `there` `count` times in another thread and return the results. Meanwhile, repeat `here` in this one."""
    found: list[float] = []

    def serve(stop: threading.Event) -> None:
        while len(found) < count and not stop.is_set():
            found.append(there())

    with _served(serve) as thread:
        while thread.is_alive():
            here()
    return found


def _lost(here: Work, there: Work, seconds: float, clock: Clock) -> tuple[float, float]:
    alone = _alone(here, seconds / 2, clock), _alone(there, seconds / 2, clock)
    counts = [0, 0]

    def serve(stop: threading.Event) -> None:
        while not stop.is_set():
            there()
            counts[1] += 1

    began = clock()
    with _served(serve) as thread:
        while clock() - began < seconds and thread.is_alive():
            here()
            counts[0] += 1
        spent = clock() - began
    whole = clock() - began  # the last call of `there` ends after ours
    return 1 - counts[0] * alone[0] / spent, 1 - counts[1] * alone[1] / whole


@contextlib.contextmanager
def _served(serve: Callable[[threading.Event], object]) -> Iterator[threading.Thread]:
    """Run `serve` in a thread within the context, which sets the event of `serve` and waits for it at the end. Raises
    the error of the thread."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                serve(stop)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="flexgen-probe")
    threads.start(thread)
    try:
        yield thread
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def _alone(work: Work, seconds: float, clock: Clock) -> float:
    """The seconds of one call."""
    began, count = clock(), 0
    while not count or clock() - began < seconds:
        work()
        count += 1
    return (clock() - began) / count
