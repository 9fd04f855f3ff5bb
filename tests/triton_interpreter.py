"""Tests of Triton kernels: on the GPU where there is one, elsewhere in Triton's interpreter.

The interpreter is chosen by the environment when Triton is imported, so the tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is the interpreter's process."""

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
"""Limits of one program, by compute capability (CUDA C++ Programming Guide, "Technical Specifications")."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def runs_kernels(test):
    """On a GPU, where `-m gpu` selects it; in the interpreter's process it needs none."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def check_in_the_interpreter(file):
    """Run the tests of a file, except those that compile kernels, in the interpreter's process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "not compiled_for", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout, done.stdout  # the test that calls this
