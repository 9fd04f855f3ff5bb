"""Cells that one call computes: their tokens as rows of one token, and attention of each cell alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flexgen.kernels.scoring import Scoring
from flexgen.models import Chunk
from flexgen.models.spec import RopeSpec
from flexgen.runtime.joint_cells import JointCells

HEADS, KV_HEADS, DIM = 4, 2, 3
SHAPES = [(2, 1), (3, 5), (1, 4)]  # rows and new tokens of each cell


@dataclass
class Cell:
    """The `Context` of a cell, whose attention is the mean of all its arguments, by row and head."""

    positions: Tensor
    factor: float
    text_length: Tensor | None = None
    last_only: bool = True

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return torch.full((self.positions.numel(), 1), self.factor)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        rows, new = self.positions.shape
        assert q.shape == (rows, HEADS, new, DIM)
        assert k.shape == v.shape == (rows, KV_HEADS, new, DIM)
        return q + (k + v).mean(1, keepdim=True).cumsum(2) + self.factor

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        raise NotImplementedError

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        raise NotImplementedError


def cells() -> list[Cell]:
    return [Cell(torch.arange(rows * new).view(rows, new), 10.0 * new) for rows, new in SHAPES]


@pytest.mark.parametrize("last_only", [False, True])
def test_what_is_joined_is_divided_again(last_only: bool) -> None:
    joint = JointCells(cells(), last_only)
    xs = [torch.randn(rows, new, 6) for rows, new in SHAPES]
    expected = [x[:, -1:] for x in xs] if last_only else xs
    together = joint.join(xs)
    assert together.shape == (sum(x.shape[0] * x.shape[1] for x in expected), 1, 6)
    for own, x in zip(joint.divide(together), expected, strict=True):
        assert own.equal(x)


def test_attention_is_that_of_each_cell() -> None:
    contexts = cells()
    joint = JointCells(contexts, last_only=False)
    joint.join([torch.zeros(rows, new, 1) for rows, new in SHAPES])
    tokens = sum(rows * new for rows, new in SHAPES)
    q = torch.randn(tokens, HEADS, 1, DIM)
    k, v = torch.randn(2, tokens, KV_HEADS, 1, DIM)
    scoring, begin = Scoring(1.0), 0
    found = joint.attend(q, k, v, scoring)
    assert found.shape == q.shape
    for context, (rows, new) in zip(contexts, SHAPES, strict=True):
        here = slice(begin, begin + rows * new)
        own = (x[here].squeeze(2).view(rows, new, -1, DIM).transpose(1, 2) for x in (q, k, v))
        expected = context.attend(*own, scoring)
        assert found[here].equal(expected.transpose(1, 2).reshape(rows * new, HEADS, 1, DIM))
        begin = here.stop


def test_each_token_has_its_position_and_its_factors() -> None:
    joint = JointCells(cells(), last_only=False)
    assert joint.positions.tolist() == [[n] for rows, new in SHAPES for n in range(rows * new)]
    factors = joint.rope_factors(RopeSpec("default", (1.0,)), torch.float32)
    assert factors.flatten().tolist() == [10.0 * new for rows, new in SHAPES for _ in range(rows * new)]
