"""Cells of a layer that one call computes: prompts that enter, and rows that decode.

The weights are read once for all of them, and products of many rows are faster per row than products of few rows.
Attention is computed cell by cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen.kernels.scoring import Scoring
from flexgen.models import Chunk, Context
from flexgen.models.spec import RopeSpec


class JointCells:
    """The `Context` of cells whose tokens are computed together, each as a row of one token.

    contexts: those of the cells. last_only: whether only the last token of each row is computed.
    """

    text_length = None  # the keys of no row depend on the length of its text

    def __init__(self, contexts: Sequence[Context], last_only: bool) -> None:
        self.last_only = last_only
        self._contexts = contexts
        self._shapes: list[tuple[int, int]] = []  # rows and tokens of each cell

    def join(self, xs: Sequence[Tensor]) -> Tensor:
        """The hidden states (rows, new, hidden) of the cells as (tokens, 1, hidden)."""
        if self.last_only:
            xs = [x[:, -1:] for x in xs]
        self._shapes = [(x.shape[0], x.shape[1]) for x in xs]
        return torch.cat([x.flatten(0, 1) for x in xs]).unsqueeze(1)

    def divide(self, y: Tensor) -> list[Tensor]:
        """The result of each cell (rows, new, n), from that of all tokens (tokens, 1, n)."""
        return [own.view(*shape, -1) for own, shape in zip(self._split(y), self._shapes, strict=True)]

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.split([rows * new for rows, new in self._shapes])

    @property
    def positions(self) -> Tensor:
        return torch.cat([context.positions.reshape(-1, 1) for context in self._contexts])

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return torch.cat([context.rope_factors(rope, dtype) for context in self._contexts])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """q and the result (tokens, heads, 1, head_dim), k and v (tokens, kv_heads, 1, head_dim)."""
        outs = []
        for context, (rows, new), *own in zip(
            self._contexts, self._shapes, *map(self._split, (q, k, v)), strict=True
        ):
            queries, keys, values = (x.squeeze(2).unflatten(0, (rows, new)).transpose(1, 2) for x in own)
            out = context.attend(queries, keys, values, scoring)
            outs.append(out.transpose(1, 2).flatten(0, 1).unsqueeze(2))
        return torch.cat(outs)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a row has one token")

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        raise AssertionError("a row has one token")
