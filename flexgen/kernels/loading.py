"""The compiled module and the GPU kernels where there are any, and which version of the kernels is in use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

try:
    from flexgen.kernels import _native as native
except ImportError:  # installed without a compiler
    native = None  # type: ignore[assignment]

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The element types that the compiled kernels know."""

_log = logging.getLogger(__name__)


def native_available() -> bool:
    """Whether the compiled kernels are used: they were built, and FLEXGEN_NATIVE is not 0."""
    return native is not None and not switched_off()


def switched_off() -> bool:
    """Whether FLEXGEN_NATIVE is 0."""
    return os.environ.get("FLEXGEN_NATIVE") == "0"


@functools.cache
def announce() -> bool:
    """`native_available()`; says once, at the first use, which kernels the CPU runs."""
    if native_available():
        _log.info("CPU kernels: compiled, %s", native.variant())
    elif switched_off():
        _log.info("CPU kernels: torch, since FLEXGEN_NATIVE is 0")
    else:
        _log.warning(
            "CPU kernels: torch, which attends to a cache several times slower. The compiled ones were not "
            "built: install a C++17 compiler and install flexgen again"
        )
    return native_available()


_LEAST_CAPABILITY = (7, 5)
"""The oldest NVIDIA GPUs that the kernels are compiled for (`tests/kernels/test_triton_groupwise.py`)."""


@functools.cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """`flexgen.kernels.triton_groupwise` for a GPU that Triton knows, None for another device and without Triton.

    Says once for each GPU which kernels it runs. The import waits until here: Triton takes a second to load, and
    a machine without a GPU need not have it. A kernel is tried out, since Triton builds what launches one with a C
    compiler, and only at the first launch.
    """
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        _log.warning(
            "kernels on %s: torch, which decodes weights several times slower: install triton", device
        )
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        _log.info("kernels on %s: torch, since the kernels in Triton are not made for this GPU", device)
        return None
    try:
        kernels = importlib.import_module("flexgen.kernels.triton_groupwise")
        kernels.try_out(device)
    except Exception as error:  # whatever it is: torch can do the same
        reason = str(error).strip().splitlines() or [""]
        _log.warning(
            "kernels on %s: torch, which decodes weights several times slower, since Triton cannot launch its own "
            "(%s: %s). It needs a C compiler and the headers of Python",
            device,
            type(error).__name__,
            reason[-1],
        )
        return None
    _log.info("kernels on %s: Triton", device)
    return kernels
