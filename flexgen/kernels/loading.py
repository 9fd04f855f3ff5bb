"""Loads the compiled CPU kernels and the GPU kernels if they are available, and logs the kernels in use."""

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
"""The element types that the compiled kernels support, with their numbers."""
HALVES = torch.bfloat16, torch.float16

_log = logging.getLogger(__name__)


def native_available() -> bool:
    """Whether the compiled kernels are used: they were built, and FLEXGEN_NATIVE is not 0."""
    return native is not None and not switched_off()


def switched_off() -> bool:
    """Whether FLEXGEN_NATIVE is 0."""
    return os.environ.get("FLEXGEN_NATIVE") == "0"


@functools.cache
def announce() -> bool:
    """`native_available()`. Logs once, on the first use, which kernels the CPU runs."""
    if native_available():
        _log.info("CPU kernels: compiled, %s", native.variant())
    elif switched_off():
        _log.info("CPU kernels: torch, because FLEXGEN_NATIVE is 0")
    else:
        _log.warning(
            "CPU kernels: torch, whose attention over the cache is several times slower. The compiled kernels are "
            "not built: install a C++17 compiler and install flexgen again"
        )
    return native_available()


_LEAST_CAPABILITY = (7, 5)
"""The lowest compute capability for which the kernels compile (`tests/kernels/test_triton_groupwise.py`)."""


@functools.cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """`flexgen.kernels.triton_groupwise` for a GPU that Triton supports, or None.

    Logs once per GPU which kernels it runs. The import happens only here: Triton takes a second to load, and machines
    without a GPU may not have it. The function launches a kernel once, because Triton compiles its launcher with a C
    compiler on the first launch, which may fail.
    """
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        _log.warning(
            "kernels on %s: torch, which decodes weights several times slower: install triton", device
        )
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        _log.info("kernels on %s: torch, because the Triton kernels do not support this GPU", device)
        return None
    try:
        kernels = importlib.import_module("flexgen.kernels.triton_groupwise")
        kernels.try_out(device)
    except Exception as error:  # any error: torch can do the same
        reason = str(error).strip().splitlines() or [""]
        _log.warning(
            "kernels on %s: torch, which decodes weights several times slower, because Triton cannot launch a kernel "
            "(%s: %s). Install a C compiler and the headers of Python",
            device,
            type(error).__name__,
            reason[-1],
        )
        return None
    _log.info("kernels on %s: Triton", device)
    return kernels


@functools.cache
def triton_grouped(device: torch.device) -> ModuleType | None:
    """`flexgen.kernels.triton_grouped` for a GPU for which there are `triton_kernels`, or None."""
    return importlib.import_module("flexgen.kernels.triton_grouped") if triton_kernels(device) else None
