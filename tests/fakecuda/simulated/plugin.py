"""A pytest plugin (`-p simulated.plugin`): the whole run computes right numbers on the simulated GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from simulated.groups import simulated_kernels
from simulated.numbers import Numbers
from simulated.threads import in_every_thread

# Triton's own launches never come to torch's dispatcher. Its interpreter computes in host memory.
os.environ["TRITON_INTERPRET"] = "1"

_run = contextlib.ExitStack()


def pytest_sessionstart() -> None:
    _run.enter_context(in_every_thread(Numbers))


def pytest_sessionfinish() -> None:
    _run.close()


@pytest.fixture(autouse=True)
def without_the_interpreter() -> Iterator[None]:
    """Triton's interpreter takes ten times as long as the rest of a mixture. The fake kernel computes the same."""
    with simulated_kernels():
        yield
