"""Decode cells on a CPU as tapes: the kernels of a layer are recorded for one token and repeated for later ones.

All layers share the data of the token. The rotary factors have buffers, because a tape reads the same addresses for
each token. The hidden states between two layers stay where the tape of the first layer writes them. So if no data
moves between consecutive cells, one call replays all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flexgen.kernels.scoring import Scoring
from flexgen.kernels.tape import Tape, record, replay
from flexgen.models import Layer, Weights
from flexgen.models.embed import Head
from flexgen.models.layer import AttentionLayer, Chunk, Context, TransformerLayer
from flexgen.models.spec import RopeSpec
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.kvcache import KVCache
from flexgen.units import MIB

MIN_TOKENS = 3
"""A run of more than this number of tokens is recorded: to record a cell takes longer than to compute it."""
MOST_BYTES = 4 * MIB
"""Bytes of temporaries that the tapes of a block keep. Further cells are computed without tapes: with many rows, the
code between the kernels takes a small part of the time."""


@dataclass
class _Token:
    """The data of a batch in one pass at fixed addresses: the rotary factors of its `positions`, and the result of
    the layer that was recorded last."""

    factors: dict[tuple[RopeSpec, torch.dtype], Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    y: Tensor | None = None

    def fill(self, context: Context) -> None:
        """Fill the buffers for the positions of the cell, unless another layer has already done it."""
        if context.positions is self.positions:
            return
        for (rope, dtype), factors in self.factors.items():
            factors.copy_(context.rope_factors(rope, dtype))
        self.positions = context.positions

    def add(self, rope: RopeSpec, dtype: torch.dtype, context: Context) -> None:
        """Add a buffer, unless another layer has already added it."""
        if (rope, dtype) not in self.factors:
            self.factors[rope, dtype] = context.rope_factors(rope, dtype).clone()


@dataclass(frozen=True)
class _Recording:
    """The `Context` of a layer that is recorded."""

    context: Context
    cache: KVCache
    cell: BoundCell
    token: _Token

    @property
    def positions(self) -> Tensor:
        return self.context.positions

    @property
    def text_length(self) -> Tensor | None:
        return self.context.text_length

    @property
    def last_only(self) -> bool:
        return self.context.last_only

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return self.token.factors[rope, dtype]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return self.cache.attend_in_place(self.cell, q, k, v, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a decode cell computes one token")

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        raise AssertionError("a decode cell computes one token")


@dataclass(frozen=True)
class _Recorded:
    """The tape of a cell, recorded with `length` cached tokens. It reads `x` and writes `y`."""

    tape: Tape
    length: int
    x: Tensor
    y: Tensor


class RecordedCells:
    """Tapes of the decode cells of one block. It has the methods of `CellGraphs`, and `replay` for several layers.

    in_place: the numbers of the layers whose weights do not move, so that they stay at their addresses.
    """

    def __init__(self, layers: Sequence[Layer], in_place: Sequence[int], cache: KVCache) -> None:
        self._layers = {j: layers[j] for j in in_place if isinstance(layers[j], TransformerLayer | Head)}
        self._cache = cache
        self.drop()

    def expect(self, tokens: int) -> None:
        """Announce that the next run computes `tokens` tokens with the same batches. Without this, it has no
        tapes."""
        self._pays = tokens > MIN_TOKENS

    def drop(self) -> None:
        """Drop all tapes, before other batches or prompts, and at the end of a call. No step may be in flight."""
        self._pays = False
        self._nbytes = 0
        self._tokens: dict[int, _Token] = {}
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}  # None: it cannot be recorded

    def close(self) -> None:
        """Release all memory."""
        self.drop()

    def serves(self, cell: BoundCell, rows: int, weights: Weights) -> bool:
        """Whether `compute` computes this cell of `rows` rows."""
        if not (self._pays and cell.token > 0 and cell.layer in self._layers and cell.span.decodes):
            return False
        key = cell.layer, cell.batch
        return self._recorded[key] is not None if key in self._recorded else self._can_record(cell)

    def _can_record(self, cell: BoundCell) -> bool:
        layer = self._layers[cell.layer]
        if not isinstance(layer, AttentionLayer):
            return True
        if layer.layer_spec.attention.window is not None or cell.padding.any or cell.prefix is not None:
            return False
        return self._cache.records(cell.layer, cell.batch)

    def compute(self, cell: BoundCell, context: Context, x: Tensor, weights: Weights) -> Tensor:
        """The layer's result, from hidden states x (rows, 1, hidden). Part of the cell's computation.

        The layer of the next token overwrites the result. context: the context of the cell without tapes.
        """
        if (cell.layer, cell.batch) in self._recorded:
            return self.replay(cell, range(cell.layer, cell.layer + 1), context, x)[0]
        layer, token = self._layers[cell.layer], self._tokens.setdefault(cell.batch, _Token())
        token.fill(context)
        if isinstance(layer, AttentionLayer) and (rope := layer.layer_spec.attention.rope) is not None:
            token.add(rope, x.dtype, context)
        if token.y is not x:  # a tensor that others overwrite or free
            x = x.clone()
        token.y = self._record(cell, _Recording(context, self._cache, cell, token), x, weights)
        return token.y

    def joins(self, layer: int, batch: int) -> bool:
        """Whether the tape of a cell continues that of the previous layer, so that one call can `replay` both."""
        before, own = (self._recorded.get((j, batch)) for j in (layer - 1, layer))
        if not self._pays or before is None or own is None:
            return False
        return own.x is before.y and own.length == before.length

    def replay(
        self, cell: BoundCell, layers: range, context: Context, x: Tensor
    ) -> tuple[Tensor, list[float]]:
        """Compute consecutive layers that `joins`, from hidden states x. The cell is that of the first one.

        Returns the result of the last layer, and the seconds from the beginning to the end of each.
        """
        self._tokens[cell.batch].fill(context)
        tapes = [found for j in layers if (found := self._recorded[j, cell.batch]) is not None]
        first, last = tapes[0], tapes[-1]
        if x is not first.x:
            first.x.copy_(x)
        return last.y, replay([found.tape for found in tapes], cell.span.length - first.length)

    def _record(self, cell: BoundCell, context: _Recording, x: Tensor, weights: Weights) -> Tensor:
        layer = self._layers[cell.layer]
        y, tape = record(partial(layer.forward, x, weights, context))
        kept = None
        if tape is not None and self._nbytes + tape.nbytes <= MOST_BYTES:
            self._nbytes += tape.nbytes
            kept = _Recorded(tape, cell.span.length, x, y)
        self._recorded[cell.layer, cell.batch] = kept
        return y
