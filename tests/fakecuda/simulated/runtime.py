"""The simulated CUDA runtime that this process runs on: its counters, and the faults that it can be given."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

_LIBRARY = os.environ.get("LD_PRELOAD", "")


def running() -> bool:
    """Whether this process runs on the simulated runtime."""
    return "libfakecuda" in _LIBRARY


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    library.fakecuda_counters.restype = ctypes.c_char_p
    library.fakecuda_fail_after.argtypes = [ctypes.c_long]
    return library


@dataclass(frozen=True)
class Counters:
    """What the runtime has counted since the last `reset`.

    launches: kernels by name. host_waits: calls that block the host, by function. copied: bytes by direction and kind
    of host memory. contexts: calls by device that would create its context. pinned: bytes registered or allocated;
    registrations: buffers that were registered.
    The last three are hazards: pinned memory that the host changed, or freed, or that another stream copied, while a
    copy still used it.
    """

    launches: dict[str, int]
    host_waits: dict[str, int]
    copied: dict[str, int]
    contexts: dict[str, int]
    device_used: dict[str, int]
    pinned: int
    registrations: int
    live_events: int
    most_events: int
    overwritten_uploads: int
    unordered_copies: int
    released_in_flight: int

    @property
    def kernels(self) -> int:
        """Launches of all kernels."""
        return sum(self.launches.values())

    @property
    def hazards(self) -> int:
        """Uses of pinned memory that a copy was not ordered with."""
        return self.overwritten_uploads + self.unordered_copies + self.released_in_flight


def counters() -> Counters:
    """The counters now."""
    return Counters(**json.loads(_library().fakecuda_counters()))


def reset() -> None:
    """Count from zero. Live events, pinned memory and used device memory stay as they are."""
    _library().fakecuda_reset_counters()


@contextlib.contextmanager
def failing(after: int) -> Iterator[None]:
    """The device fails at the launch after `after` more, and in every call behind it."""
    _library().fakecuda_fail_after(after)
    try:
        yield
    finally:
        _library().fakecuda_fail_after(-1)


@contextlib.contextmanager
def refusing_to_pin() -> Iterator[None]:
    """cudaHostRegister fails, as under a limit of locked memory."""
    _library().fakecuda_refuse_registration(1)
    try:
        yield
    finally:
        _library().fakecuda_refuse_registration(0)
