"""Rows that have stopped leave the batch: the ids stay those of transformers, and fewer rows are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.engine import OptLM
from flexgen.errors import LaneError
from flexgen.memory.disk import DiskIO
from flexgen.models import Head
from flexgen.policy import Policy, Tier
from flexgen.runtime import compaction
from flexgen.runtime.kvcache import KVCache
from flexgen.schedule import ORDERS, Op

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
NAME = "llama gqa 2"
LENGTHS = [9, 3, 7, 5, 8, 2, 6, 4, 3, 7, 5, 6]
SPLITS = [
    {"gpu": 100},
    {"cpu": 100},
    {"disk": 100},
    {"gpu": 34, "cpu": 33, "disk": 33},
    {"gpu": 43, "cpu": 43, "disk": 14},
    {"gpu": 30, "disk": 70},
]


class Script:
    """Stands in for the choice of ids: row `n` of the first batches stops at its own time.

    The reference is transformers' own ids without a stop, cut off at those times: a model's next id depends on
    what came before it only, and here what comes is transformers' too.
    """


def staggered(tiny: Any, rows: list[list[int]], tokens: int, least: int = 4) -> tuple[list[int], np.ndarray]:
    """Stop ids under which the rows stop at many different tokens, and what must come out.

    Ids are added, those that end most rows latest, until no row goes on to the end or all rows stop at once.
    """
    free = tiny.greedy(rows, tokens)[:, max(map(len, rows)) :]
    best: tuple[int, list[int]] = (0, [])
    rng = np.random.default_rng(0)
    for _ in range(200):
        stop = rng.choice(np.unique(free), size=rng.integers(1, 5), replace=False).tolist()
        ends = {end(row, stop) for row in free}
        best = max(best, (len(ends), sorted(stop)))
    assert best[0] >= least, "rows must stop at different tokens"
    return best[1], tiny.greedy(rows, tokens, best[1])


def end(row: np.ndarray, stop: list[int]) -> int:
    """Tokens that a row makes, its stop id included."""
    ends = np.flatnonzero(np.isin(row, stop))
    return int(ends[0]) + 1 if len(ends) else len(row)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch whose head was computed, in order."""
    counts: list[int] = []
    forward = Head.forward

    def counted(self: Head, x: Any, *args: Any) -> Any:
        counts.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(Head, "forward", counted)
    return counts
