"""Decode cells on a CPU as tapes: the kernels of all layers are recorded before the first pass that runs them.

All layers share the data of the pass. The rotary factors have buffers, because a tape reads the same addresses for
each pass, and so have the lengths of rows, which differ with guesses. A pass with guesses has other tapes than one
without. The hidden states between two layers stay where the tape of the first layer writes them. So if no data
moves between consecutive cells, one call replays all of them, up to the logits. The results within a layer are in the
memory of the layer before the previous one, so that they stay in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from flexgen.kernels.rotation import token_factors
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.tape import Tape, record, replay
from flexgen.layout.tapes import MIN_TOKENS, MOST_BYTES
from flexgen.models import Layer, Weights
from flexgen.models.embed import Head
from flexgen.models.layer import AttentionLayer, Chunk, Context, TransformerLayer
from flexgen.models.ops import rope_tables
from flexgen.models.spec import RopeSpec
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.kvcache import KVCache

TOKENS_AHEAD = 64
"""The tokens of all rows whose rotary factors are computed at once: it takes a dozen operations of torch."""


@dataclass
class _Factors:
    """The rotary factors of one pass at a fixed address (`present`). Without guesses, from those of a few tokens
    (`ahead`), the first of which has `begin` cached tokens.

    positions (rows, 1): those of the token with `length` cached tokens.
    """

    rope: RopeSpec
    positions: Tensor
    length: int
    present: Tensor
    ahead: Tensor | None = None
    begin: int = 0

    def fill(self, cell: BoundCell, context: Context) -> None:
        """Fill `present` for the pass of the cell."""
        # These kinds depend on the length of the text. With guesses, rows have different positions.
        if cell.guesses is not None or self.rope.kind in ("dynamic", "longrope"):
            self.present.copy_(context.rope_factors(self.rope, self.present.dtype))
            return
        length = cell.span.length
        tokens = max(TOKENS_AHEAD // len(self.positions), 1)
        if self.ahead is None or not self.begin <= length < self.begin + tokens:
            positions = self.positions + torch.arange(length, length + tokens) - self.length
            factors = token_factors(*rope_tables(self.rope, positions, self.present.dtype))
            self.ahead, self.begin = factors.unflatten(0, positions.shape), length
        self.present.copy_(self.ahead[:, length - self.begin])


@dataclass
class _Pass:
    """The data of a batch in pass `number` at fixed addresses: its rotary factors. `length`: the cached tokens of its
    rows. With guesses, also `lengths` (2, rows): the tokens of each row before and after the pass.

    `tensors`: the results of the tapes of even and of odd layers. A layer reads the result of the other kind, and
    overwrites those of its own."""

    factors: dict[tuple[RopeSpec, torch.dtype], _Factors] = field(default_factory=dict)
    number: int | None = None
    length: int = 0
    lengths: Tensor | None = None
    tensors: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))

    def fill(self, cell: BoundCell, context: Context) -> None:
        """Fill the buffers for the cell, unless another layer has already done it."""
        if cell.number == self.number:
            return
        for factors in self.factors.values():
            factors.fill(cell, context)
        if cell.guesses is not None:
            before = cell.guesses.lengths
            cached = cell.contexts(range(len(before)))
            both = torch.stack((before, cached + cell.span.new))
            self.lengths = both if self.lengths is None else self.lengths.copy_(both)
        self.number, self.length = cell.number, cell.span.length

    def add(self, rope: RopeSpec, dtype: torch.dtype, context: Context) -> None:
        """Add a buffer for the present pass, unless another layer has already added it."""
        if (rope, dtype) not in self.factors:
            present = context.rope_factors(rope, dtype).clone()
            self.factors[rope, dtype] = _Factors(rope, context.positions, self.length, present)


@dataclass(frozen=True)
class _Recording:
    """The `Context` of a layer that is recorded. `positions`: computed before, because it takes operations of
    torch."""

    context: Context
    positions: Tensor
    cache: KVCache
    cell: BoundCell
    data: _Pass

    @property
    def text_length(self) -> Tensor | None:
        return self.context.text_length

    @property
    def last_only(self) -> bool:
        return self.context.last_only

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return self.data.factors[rope, dtype].present

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        length, by_row = self.cell.span.length, self.data.lengths
        lengths = (length, length + 1) if by_row is None else (by_row[0], by_row[1])
        return self.cache.attend_in_place(self.cell, lengths, q, k, v, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a decode cell computes a few tokens")

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        raise AssertionError("a decode cell computes a few tokens")


@dataclass(frozen=True)
class _Recorded:
    """The tape of a cell, recorded with `length` cached tokens. It reads `x` and writes `y`. by_row: whether it reads
    the lengths of rows instead."""

    tape: Tape
    length: int
    by_row: bool
    x: Tensor
    y: Tensor


class RecordedCells:
    """Tapes of the decode cells of one block. It has the methods of `CellGraphs`, `record` for the cells of a pass,
    and `replay` for several layers.

    recorded: the numbers of the layers that may be recorded (`layout/tapes.py`).
    dtype: that of the hidden states. `pays`: whether the present run has enough tokens to record its cells.
    """

    def __init__(
        self, layers: Sequence[Layer], recorded: Sequence[int], cache: KVCache, dtype: torch.dtype
    ) -> None:
        self._layers = {j: layers[j] for j in recorded if isinstance(layers[j], TransformerLayer | Head)}
        self._cache = cache
        self._dtype = dtype
        self.drop()

    @property
    def layers(self) -> Sequence[int]:
        """The numbers of the layers whose cells may be recorded."""
        return [*self._layers]

    def expect(self, tokens: int) -> None:
        """Announce that the next run computes `tokens` tokens with the same batches. Without this, it has no
        tapes."""
        self.pays = tokens > MIN_TOKENS

    def drop(self) -> None:
        """Drop all tapes, before other batches or prompts, and at the end of a call. No step may be in flight."""
        self.pays = False
        self._nbytes = 0
        self._passes: dict[tuple[int, int], _Pass] = {}  # by batch and number of new tokens
        self._recorded: dict[tuple[int, int, int], _Recorded] = {}

    def close(self) -> None:
        """Release all memory."""
        self.drop()

    # Recording

    def misses(self, cell: BoundCell) -> bool:
        """Whether a run `pays` and the cells of this batch with as many new tokens are not recorded yet."""
        decodes = self.pays and cell.token > 0 and cell.span.decodes
        return decodes and (cell.batch, cell.span.new) not in self._passes

    def record(self, cell: BoundCell, context: Context, weights: Mapping[int, Weights]) -> None:
        """Record the cells of a batch in the pass of `cell`, without computing them.

        context: the context of the cell without tapes. weights: those of the layers to record, in their order, by
        number. Layers that cannot be recorded are left out.
        """
        data = self._passes[cell.batch, cell.span.new] = _Pass()
        data.fill(cell, context)
        positions = context.positions
        for j, own in weights.items():
            layer, cell = self._layers[j], replace(cell, layer=j)
            if not self._can_record(cell, own):
                continue
            if isinstance(layer, AttentionLayer) and (rope := layer.layer_spec.attention.rope) is not None:
                data.add(rope, self._dtype, context)
            self._record(cell, _Recording(context, positions, self._cache, cell, data), own)

    def _can_record(self, cell: BoundCell, weights: Weights) -> bool:
        layer = self._layers[cell.layer]
        if layer.reads_back(len(cell.padding.starts) * cell.span.new, weights):
            return False
        if not isinstance(layer, AttentionLayer):
            return True
        if layer.layer_spec.attention.window is not None or cell.padding.any:
            return False
        return self._cache.records(cell.layer, cell.batch)

    def _record(self, cell: BoundCell, context: _Recording, weights: Weights) -> None:
        layer, tensors = self._layers[cell.layer], context.data.tensors[cell.layer % 2]
        before = self._recorded.get(_key(replace(cell, layer=cell.layer - 1)))
        if before is None:
            rows, new = len(cell.padding.starts), cell.span.new
            x = torch.empty(rows, new, layer.spec.hidden_size, dtype=self._dtype)
        else:
            x = before.y
        found = record(partial(layer.forward, x, weights, context), tensors)
        if found is None:
            return
        y, tape = found
        added = [own for own in tape.tensors if not any(own is other for other in tensors)]
        nbytes = sum(own.nbytes for own in added)
        if self._nbytes + nbytes > MOST_BYTES:
            return
        self._nbytes += nbytes
        tensors += added
        self._recorded[_key(cell)] = _Recorded(tape, cell.span.length, cell.guesses is not None, x, y)

    # Cells from tapes

    def serves(self, cell: BoundCell, rows: int, weights: Weights) -> bool:
        """Whether `compute` computes this cell of `rows` rows."""
        return cell.token > 0 and cell.span.decodes and _key(cell) in self._recorded

    def compute(self, cell: BoundCell, context: Context, x: Tensor, weights: Weights) -> Tensor:
        """The layer's result, from hidden states x (rows, new, hidden). Part of the cell's computation.

        The layer after the next one overwrites the result. context: the context of the cell without tapes.
        """
        return self.replay(cell, range(cell.layer, cell.layer + 1), context, x)[0]

    def joins(self, layer: int, batch: int) -> bool:
        """Whether the tape of a cell continues that of the previous layer, so that one call can `replay` both. With
        guesses none does, because the next pass may have another number of new tokens."""
        before, own = (self._recorded.get((j, batch, 1)) for j in (layer - 1, layer))
        if before is None or own is None or own.by_row:
            return False
        return own.x is before.y and own.length == before.length

    def replay(
        self, cell: BoundCell, layers: range, context: Context, x: Tensor
    ) -> tuple[Tensor, list[float]]:
        """Compute consecutive layers that `joins`, from hidden states x. The cell is that of the first one.

        Returns the result of the last layer, and the seconds from the beginning to the end of each.
        """
        batch, new = cell.batch, cell.span.new
        self._passes[batch, new].fill(cell, context)
        tapes = [self._recorded[j, batch, new] for j in layers]
        first, last = tapes[0], tapes[-1]
        if x is not first.x:
            first.x.copy_(x)
        return last.y, replay([found.tape for found in tapes], cell.span.length - first.length)


def _key(cell: BoundCell) -> tuple[int, int, int]:
    """The layer, the batch and the number of new tokens."""
    return cell.layer, cell.batch, cell.span.new
