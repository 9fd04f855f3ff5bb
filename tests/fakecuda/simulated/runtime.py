"""The simulated CUDA runtime that this process runs on: its counters, and the faults that it can be given."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_LIBRARY = os.environ.get("LD_PRELOAD", "")
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def running() -> bool:
    """Whether this process runs on the simulated runtime."""
    return "libfakecuda" in _LIBRARY


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    library.fakecuda_counters.restype = ctypes.c_char_p
    library.fakecuda_fail_after.argtypes = [ctypes.c_long]
    library.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, _HOST_FUNCTION, ctypes.c_void_p]
    return library


@dataclass(frozen=True)
class Counters:
    """What the runtime has counted since the last `reset`.

    launches: kernels by name, without those of CUDA graphs. graph_launches: of whole graphs; graph_kernels: theirs.
    host_waits: calls that block the host, by function. copied: bytes by direction and kind
    of host memory. contexts: calls by device that would create its context. pinned: bytes registered or allocated;
    registrations: buffers that were registered.
    The last three are hazards: pinned memory that the host changed, or freed, or that another stream copied, while a
    copy still used it.
    """

    launches: dict[str, int]
    graph_launches: int
    graph_kernels: int
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
        """Launches of all kernels that the host has launched one by one."""
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


@contextlib.contextmanager
def refusing_to_capture() -> Iterator[None]:
    """No stream begins to capture a CUDA graph."""
    _library().fakecuda_refuse_capture(1)
    try:
        yield
    finally:
        _library().fakecuda_refuse_capture(0)


_in_graphs: list[Callable[[], object]] = []
"""What graphs call, for as long as the process runs: a graph keeps only the number."""


@_HOST_FUNCTION
def _call(number: int | None) -> None:
    _in_graphs[(number or 0) - 1]()


def capturing() -> bool:
    """Whether the current stream of this thread captures a CUDA graph: what is launched does not run now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def at_each_launch(function: Callable[[], object]) -> None:
    """Have the graph that is being captured call `function` in the order of its nodes, in the launching thread."""
    _in_graphs.append(function)
    _library().cudaLaunchHostFunc(torch.cuda.current_stream().cuda_stream, _call, len(_in_graphs))
