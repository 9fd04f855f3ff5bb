"""Slows transfers that overlap down to a common bandwidth, that of an emulated disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Throttle:
    """Delays the ends of transfers so that they keep to `bandwidth` bytes/s; None for no limit.

    Transfers that overlap share the bandwidth. `bandwidth` may be changed at any time. Safe to call from several
    threads. `clock` and `sleep` are replaced in tests.
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
        self._idle_from = 0.0  # when the emulated disk has finished all transfers so far

    def wait(self, began: float, nbytes: int) -> None:
        """Return when a transfer of `nbytes`, which began at this time of `clock`, may end."""
        if self.bandwidth is None:
            return
        with self._lock:
            self._idle_from = max(self._idle_from, began) + nbytes / self.bandwidth
            due = self._idle_from
        if (left := due - self.clock()) > 0:
            self._sleep(left)
