"""Limits overlapping transfers to a common bandwidth, that of an emulated disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Throttle:
    """Delays the ends of transfers so that they do not exceed `bandwidth` bytes/s; None for no limit.

    Transfers that overlap share the bandwidth. `bandwidth` may be changed at any time. Safe to call from several
    threads. Tests replace `clock` and `sleep`.
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bandwidth = bandwidth
        self.clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._idle_from = 0.0  # the time at which the emulated disk has finished all transfers so far

    def wait(self, began: float, nbytes: int) -> None:
        """Block until a transfer of `nbytes` that began at `began` (by `clock`) may end."""
        if self.bandwidth is None:
            return
        with self._lock:
            self._idle_from = max(self._idle_from, began) + nbytes / self.bandwidth
            due = self._idle_from
        if (left := due - self.clock()) > 0:
            self._sleep(left)
