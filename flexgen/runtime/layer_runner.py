"""Computes cells: provides the inputs and weights of a layer, and stores its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from flexgen.kernels.rotation import token_factors
from flexgen.kernels.scoring import Scoring
from flexgen.models import Chunk, Weights
from flexgen.models.embed import Head
from flexgen.models.layer import AttentionLayer
from flexgen.models.ops import rope_tables
from flexgen.models.spec import RopeSpec
from flexgen.runtime.attention_outputs import OnDevice
from flexgen.runtime.buffers import BlockBuffers
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.joint_cells import JointCells
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.model import Model
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.recorded import RecordedCells
from flexgen.runtime.tokens import Output
from flexgen.schedule.steps import Grid


@dataclass(frozen=True)
class _Positions:
    """The positions of a batch in one pass and their RoPE factors, which all layers share. They are computed when
    they are first used, because tapes have their own factors."""

    _prompts: Prompts
    _cell: BoundCell
    _factors: dict[tuple[RopeSpec, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        return self._prompts.positions(self._cell)

    @cached_property
    def text_length(self) -> Tensor | None:
        return self._prompts.text_length(self._cell)

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        key = rope, dtype
        factors = self._factors.get(key)
        if factors is None:
            factors = token_factors(*rope_tables(rope, self.positions, dtype, self.text_length))
            self._factors[key] = factors
        return factors


@dataclass(frozen=True)
class _CellContext:
    """The `Context` in which a layer computes a cell."""

    cell: BoundCell
    cache: KVCache
    last_only: bool
    _positions: _Positions

    @property
    def positions(self) -> Tensor:
        return self._positions.positions

    @property
    def text_length(self) -> Tensor | None:
        return self._positions.text_length

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return self._positions.rope_factors(rope, dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return self.cache.attend(self.cell, q, k, v, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        self.cache.keep(self.cell, k, v)

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return self.cache.attend_chunk(self.cell, chunk, q, k, v, scoring)


@dataclass(frozen=True)
class _Half:
    """The result of a layer's first half, on the compute device. `attention`: the attention of the device's rows."""

    x: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    attention: OnDevice = OnDevice()


class LayerRunner:
    """Computes the cells of one run: a whole layer, or two halves with host attention between them.

    first: the number of the grid's first pass. All methods except `feeds` are jobs of the compute lane.
    """

    def __init__(
        self, grid: Grid, model: Model, buffers: BlockBuffers, prompts: Prompts, output: Output, first: int
    ) -> None:
        self._grid = grid
        self._model = model
        self._buffers = buffers
        self._prompts = prompts
        self._output = output
        self._first = first
        self._positions: dict[int, _Positions] = {}  # by batch
        self._halves: dict[int, _Half] = {}  # by slot, between `project` and `finish`
        self._ends: dict[tuple[int, int], list[float]] = {}  # by pass and first layer, until `ends`
        self._run = object()  # distinguishes the visits of this run from all others; an id could be reused

    def feeds(self, cell: BoundCell) -> bool:
        """Whether the ids that the cell reads are on the device, from the previous token in this run."""
        return self._grid.feeds_ids and cell.token > 0 and cell.number > self._first

    # A whole layer

    def compute(self, cell: BoundCell) -> None:
        """Compute the cell with the whole layer."""
        x, weights, lookup = self._input(cell), self._weights(cell), self._buffers.lookup
        if cell.layer == 0:
            self.record(cell)
        if cell.layer == 0 and lookup is not None:
            x, rows = lookup.take(x.shape, cell.slot)
            weights = {**weights, lookup.name: rows}
        replays, keeps_hidden = self._buffers.replays, self._output.wants_hidden(cell.layer)
        if replays is not None and replays.serves(cell, len(x), weights) and not keeps_hidden:
            self._keep(cell, replays.compute(cell, self._context(cell), x, weights))
            return
        layer = self._model.layers[cell.layer]
        if isinstance(layer, Head) and keeps_hidden:
            self._output.keep_hidden(cell, layer.final(x, weights))
        self._keep(cell, layer.forward(x, weights, self._context(cell)))

    # Several cells

    def compute_joint(self, cells: Sequence[BoundCell]) -> None:
        """Compute cells of a layer in one call. No data of theirs moves."""
        layer = self._model.layers[cells[0].layer]
        joint = JointCells([self._context(cell) for cell in cells], isinstance(layer, Head))
        x = joint.join([self._input(cell) for cell in cells])
        y = layer.forward(x, self._weights(cells[0]), joint)
        for cell, own in zip(cells, joint.divide(y), strict=True):
            self._keep(cell, own)

    # Several layers

    def record(self, cell: BoundCell) -> None:
        """Record the cells of all layers for the batch and the pass of `cell`, unless they are recorded or will not
        be replayed often enough.

        Code leaves the caches while weights pass through them. So all cells are recorded before the first one of them
        is computed. May also be called before the run.
        """
        replays = self._buffers.replays
        if not isinstance(replays, RecordedCells) or not replays.misses(cell):
            return
        layers = [j for j in replays.layers if not self._output.wants_hidden(j)]
        context = self._context(cell, _Positions(self._prompts, cell))
        replays.record(cell, context, {j: self._weights(replace(cell, layer=j)) for j in layers})

    def compute_joined(self, cell: BoundCell, layers: range) -> None:
        """Compute the cells of consecutive layers in one call. `cell` is the first of them.

        They are layers that `RecordedCells.joins`. The first one may also be the embedding.
        """
        replays, began, first = self._buffers.replays, time.perf_counter(), cell.layer
        assert isinstance(replays, RecordedCells)
        ends = list[float]()
        if first == 0:
            self.compute(cell)
            cell, layers = replace(cell, layer=1), layers[1:]
            ends.append(time.perf_counter() - began)
        before = time.perf_counter() - began
        y, others = replays.replay(cell, layers, self._context(cell), self._input(cell))
        self._ends[cell.number, first] = ends + [before + end for end in others]
        self._keep(replace(cell, layer=layers[-1]), y)

    def ends(self, number: int, layer: int) -> list[float]:
        """The seconds from the beginning of `compute_joined` to the end of each layer. Can be read once."""
        return self._ends.pop((number, layer))

    # A layer in halves

    def project(self, cell: BoundCell) -> None:
        """Compute the first half: queries, keys and values, and gather those of the host's rows for `send`."""
        x = self._input(cell)
        qkv = self._attention(cell).qkv(x, self._weights(cell), self._context(cell))
        self._buffers.cache.host.collect(cell, *qkv)
        self._halves[cell.slot] = _Half(x, qkv)

    def attend(self, cell: BoundCell) -> None:
        """Compute attention for the device's rows."""
        half = self._halves[cell.slot]
        attention = self._buffers.cache.attend_on_device(cell, *half.qkv, self._scoring(cell))
        self._halves[cell.slot] = replace(half, attention=attention)

    def attend_on_host(self, cell: BoundCell) -> None:
        """Compute attention for the host's rows. A job of the host lane."""
        self._buffers.cache.attend_on_host(cell, self._scoring(cell))

    def finish(self, cell: BoundCell) -> None:
        """Compute the second half, from the attention of all rows."""
        half = self._halves.pop(cell.slot)
        attention = self._buffers.cache.join(cell, half.attention)
        self._keep(cell, self._attention(cell).output(attention, half.x, self._weights(cell)))

    def _scoring(self, cell: BoundCell) -> Scoring:
        return self._attention(cell).scoring(self._weights(cell))

    def _attention(self, cell: BoundCell) -> AttentionLayer:
        layer = self._model.layers[cell.layer]
        assert isinstance(layer, AttentionLayer)
        return layer

    # Inputs and results

    def _input(self, cell: BoundCell) -> Tensor:
        if cell.layer:
            return self._buffers.activations.take(cell)
        self._positions[cell.batch] = _Positions(self._prompts, cell)
        return self._prompts.fed(cell.batch) if self.feeds(cell) else self._prompts.take(cell)

    def _weights(self, cell: BoundCell) -> Weights:
        weights = self._model.weights
        slot = weights.turns.slot(cell.number, cell.layer)
        return weights.weights(cell.layer, slot, visit=(self._run, cell.number, cell.layer))

    def _context(self, cell: BoundCell, positions: _Positions | None = None) -> _CellContext:
        """positions: those of the pass, if its first layer is not computed yet."""
        last_only = self._output.last_only and cell.guesses is None
        return _CellContext(cell, self._buffers.cache, last_only, positions or self._positions[cell.batch])

    def _keep(self, cell: BoundCell, y: Tensor) -> None:
        if cell.layer == len(self._model.layers) - 1:
            self._output.keep(cell, y)
        else:
            self._buffers.activations.keep(cell, y)
            if self._output.wants_hidden(cell.layer):
                self._output.keep_hidden(cell, y)
