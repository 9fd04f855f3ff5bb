"""Tests that run on the simulated GPU of this folder; they are skipped elsewhere (`make test-cuda` runs them)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

try:
    from simulated import runtime

    SIMULATED = runtime.running() and torch.cuda.is_available()
except ImportError:
    SIMULATED = False

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SIMULATED:
        return
    skip = pytest.mark.skip(
        reason="no simulated GPU: `make test-cuda` installs torch's CUDA build and runs it"
    )
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(skip)
