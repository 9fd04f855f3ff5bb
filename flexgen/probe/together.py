"""The slowdown of lanes that work at the same time: they share cores, memory bandwidth or the queue of a disk."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable

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


def _lost(here: Work, there: Work, seconds: float, clock: Clock) -> tuple[float, float]:
    alone = _alone(here, seconds / 2, clock), _alone(there, seconds / 2, clock)
    counts = [0, 0]
    stop = threading.Event()
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            with torch.inference_mode():
                while not stop.is_set():
                    there()
                    counts[1] += 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve, name="flexgen-probe")
    began = clock()
    threads.start(thread)
    try:
        while clock() - began < seconds and thread.is_alive():
            here()
            counts[0] += 1
        spent = clock() - began
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
    whole = clock() - began  # the last call of `beside` ends after ours
    return 1 - counts[0] * alone[0] / spent, 1 - counts[1] * alone[1] / whole


def _alone(work: Work, seconds: float, clock: Clock) -> float:
    """The seconds of one call."""
    began, count = clock(), 0
    while not count or clock() - began < seconds:
        work()
        count += 1
    return (clock() - began) / count
