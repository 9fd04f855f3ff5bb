"""Tests that run on the simulated GPU of this folder; they are skipped elsewhere (`make test-cuda` runs them)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexgen.runtime.lookup import Lookup

try:
    from simulated import runtime
    from simulated.groups import grouped_kernels  # noqa: F401

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


@pytest.fixture(autouse=True)
def rows_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no numbers are computed, ids are garbage and name rows that a table in host memory does not have."""
    gather = Lookup._gather

    def gather_existing(lookup: Lookup, ids: Tensor, number: int) -> None:
        gather(lookup, ids % lookup._table.weight.shape[0], number)

    monkeypatch.setattr(Lookup, "_gather", gather_existing)
