"""How much a search computes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """The limits of one search.

    cells: the maximum number of cells to simulate for the ranking of solutions, and again to improve each of the
        best ones.
    last_cells: the same for whole models, for the best solutions.
    order_cells: the same for the best shapes in every order.
    every: of the possible batch sizes and numbers of batches, only each n-th one is tried.
    """

    cells: int = 25_000
    last_cells: int = 40_000
    order_cells: int = 10_000
    every: int = 1


THOROUGH = Effort()
"""For a policy that will run."""
QUICK = Effort(cells=1_500, last_cells=3_000, order_cells=500, every=3)
"""For figures that compare models. It takes a quarter of the time, and its policies are a few percent slower."""
SURVEY = Effort(cells=300, last_cells=500, order_cells=100, every=3)
"""For a table of many models. It takes two thirds of the time of `QUICK`, usually for the same policy."""


@contextmanager
def without_collections() -> Iterator[None]:
    """Disable Python's collection of reference cycles.

    A search makes millions of small objects but no cycles. Collections would examine all objects of the process,
    those of torch too, and take a sixth of the search's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
