"""The compiled module where there is one, and which version of the kernels is in use."""

from __future__ import annotations

import functools
import logging
import os

import torch

try:
    from flexgen.kernels import _native as native
except ImportError:  # installed without a compiler
    native = None  # type: ignore[assignment]

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The element types that the compiled kernels know."""

_log = logging.getLogger(__name__)
_switched_off = os.environ.get("FLEXGEN_NATIVE") == "0"


def native_available() -> bool:
    """Whether the compiled kernels are used: they were built, and FLEXGEN_NATIVE is not 0."""
    return native is not None and not _switched_off


@functools.cache
def announce() -> bool:
    """`native_available()`; says once, at the first use, which kernels the CPU runs."""
    if native_available():
        _log.info("CPU kernels: compiled, %s", native.variant())
    elif _switched_off:
        _log.info("CPU kernels: torch, since FLEXGEN_NATIVE is 0")
    else:
        _log.warning(
            "CPU kernels: torch, which attends to a cache several times slower. The compiled ones were not "
            "built: install a C++17 compiler and install flexgen again"
        )
    return native_available()
