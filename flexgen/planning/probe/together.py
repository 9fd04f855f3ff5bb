"""What lanes that work at the same time take from each other: cores, memory's bandwidth, a disk's one queue."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from flexgen.planning.probe.effort import Clock

Work = Callable[[], object]


def lost_shares(
    alone: tuple[float, float], here: Work, beside: Work, seconds: float, clock: Clock
) -> tuple[float, float]:
    """The shares, 0 to below 1, of its own rate that each of two kinds of work loses while the other goes on.

    `alone`: seconds of a call of either by itself. `here` runs in this thread, `beside` in another, both for
    `seconds`.
    """
    counts = [0, 0]
    stop = threading.Event()
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            with torch.inference_mode():
                while not stop.is_set():
                    beside()
                    counts[1] += 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve, name="flexgen-probe")
    began = clock()
    thread.start()
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
    whole = clock() - began  # its last call ends after ours
    shares = [1 - counts[0] * alone[0] / spent, 1 - counts[1] * alone[1] / whole]
    return min(max(shares[0], 0.0), 0.95), min(max(shares[1], 0.0), 0.95)
