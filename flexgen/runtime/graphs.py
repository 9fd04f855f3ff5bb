"""Decode cells as CUDA graphs: a layer of a batch is captured once and replayed for later tokens.

A replay reads the same addresses as the capture. So all data that changes with the token has a buffer, which is
filled before the token's first layer. The hidden states between two layers have a buffer too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from flexgen.errors import shown
from flexgen.kernels.attention import hide_next_place, hide_places
from flexgen.kernels.scoring import Scoring
from flexgen.layout.cache import CacheSegment
from flexgen.layout.graphs import LONGEST, Places, StepLayout, cache_places, step_layout
from flexgen.memory.device import ComputeDevice
from flexgen.memory.store import tensor_at
from flexgen.memory.taken import Taken
from flexgen.models import Layer, Weights
from flexgen.models.layer import AttentionLayer, Chunk, Context
from flexgen.models.spec import AttentionSpec, RopeSpec
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.pages import Fixed

MIN_TOKENS = 8
"""A run of more than this number of tokens is captured. Its first token is that of the prompts. Cells of the second
token are computed without graphs, so that libraries load their kernels. Those of the third one are captured, which
takes as long as a computation."""

_log = logging.getLogger("flexgen")


class _Step:
    """The data of the token that the graphs of one batch read (see `StepLayout`)."""

    def __init__(self, buffer: Tensor, layout: StepLayout) -> None:
        made = [
            tensor_at(buffer, begin, shape, dtype)
            for (begin, _), (shape, dtype) in zip(layout.extents, layout.shapes, strict=True)
        ]
        self.hidden, self.positions, *others = made
        kinds = len(layout.places)
        masks, indices, factors = others[:kinds], others[kinds : 2 * kinds], others[2 * kinds :]
        self._masks = dict(zip(layout.places, zip(masks, indices, strict=True), strict=True))
        self.factors = dict(zip(layout.ropes, factors, strict=True))
        self._length = 0  # of the token in the buffer; 0 for none

    def fill(self, cell: BoundCell, context: Context) -> None:
        """Fill the buffer for the token of the cell, unless another layer has already done it."""
        length = cell.span.length + 1
        if length == self._length:
            return
        for places, (hidden, index) in self._masks.items():
            count, window = places.count, places.window
            if length == self._length + 1 and not (window is not None and window.chunked):
                hide_next_place(hidden, length, count, window)
            else:
                hide_places(hidden, cell.padding.on_device, length, count, window)
            for target, number in zip(index, divmod((length - 1) % count, places.page_tokens), strict=True):
                target.fill_(number)
        self.positions.copy_(context.positions)
        for rope, factors in self.factors.items():
            factors.copy_(context.rope_factors(rope, factors.dtype))
        self._length = length

    def at(self, places: Places) -> Fixed:
        hidden, index = self._masks[places]
        return Fixed(index, hidden, places.extent(self._length))


@dataclass(frozen=True)
class _Replayed:
    """The `Context` of a captured layer."""

    step: _Step
    cache: KVCache
    cell: BoundCell
    at: Fixed | None
    """None for a layer without a cache."""
    text_length = None
    last_only = True

    @property
    def positions(self) -> Tensor:
        return self.step.positions

    def rope_factors(self, rope: RopeSpec, dtype: object) -> Tensor:
        return self.step.factors[rope]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        assert self.at is not None
        return self.cache.attend_at(self.cell, self.at, q, k, v, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a decode cell computes one token")

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        raise AssertionError("a decode cell computes one token")


@dataclass(frozen=True)
class _Graph:
    extent: int
    """The number of positions in its attention, or 0 for a layer without a cache."""
    replay: Callable[[], None]


class CellGraphs:
    """Graphs of the decode cells of one block.

    replayed: the numbers of the layers that have graphs (see `layout.graphs.replayed`). segments: those of the cache,
    which have all rows of a batch, by kind of attention. After the device has refused a capture, no cell has a graph.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        replayed: Sequence[int],
        cache: KVCache,
        segments: Mapping[AttentionSpec, CacheSegment],
        device: ComputeDevice,
    ) -> None:
        self._layers = {j: layers[j] for j in replayed}
        self._cache = cache
        self._segments = segments
        self._device = device
        self._taken = Taken()
        self._buffers: dict[int, Tensor] = {}
        self._refused = False
        self._clear()

    def expect(self, tokens: int) -> None:
        """Announce that the next run computes `tokens` tokens with the same batches. Without this, it has no
        graphs."""
        self._pays = tokens > MIN_TOKENS

    def _clear(self) -> None:
        self._pays = False
        self._steps: dict[int, _Step] = {}
        self._computed: set[tuple[int, int]] = set()  # cells that have been computed without a graph
        self._captured: dict[tuple[int, int], _Graph] = {}

    def drop(self) -> None:
        """Drop all graphs, before other batches or prompts, and at the end of a call. No step may be in flight."""
        self._clear()

    def close(self) -> None:
        """Release all memory."""
        self.drop()
        self._buffers.clear()
        self._taken.close()

    def serves(self, cell: BoundCell, rows: int, weights: Weights) -> bool:
        """Whether `compute` computes this cell of `rows` rows."""
        if not (self._pays and cell.token > 0 and cell.layer in self._layers):
            return False
        return cell.span.length < LONGEST and not self._layers[cell.layer].reads_back(rows, weights)

    def compute(self, cell: BoundCell, context: Context, x: Tensor, weights: Weights) -> Tensor:
        """The layer's result, from hidden states x (rows, 1, hidden). Part of the cell's computation.

        The batch's next layer overwrites the result. context: the context of the cell without graphs.
        """
        step = self._step(cell, x)
        step.fill(cell, context)
        if x is not step.hidden:
            step.hidden.copy_(x)
        at = self._at(cell, step)
        work = partial(self._layer, cell, _Replayed(step, self._cache, cell, at), weights)
        key = cell.layer, cell.batch
        positions = 0 if at is None else at.extent
        graph = self._captured.get(key)
        if graph is None or graph.extent != positions:
            graph = self._capture(key, positions, work)
        if graph is None:
            work()
        else:
            graph.replay()
        self._computed.add(key)
        return step.hidden

    def _at(self, cell: BoundCell, step: _Step) -> Fixed | None:
        layer = self._layers[cell.layer]
        if not isinstance(layer, AttentionLayer):
            return None
        own = layer.layer_spec.attention
        return step.at(cache_places(self._segments[own], own))

    def _layer(self, cell: BoundCell, context: _Replayed, weights: Weights) -> None:
        hidden = context.step.hidden
        hidden.copy_(self._layers[cell.layer].forward(hidden, weights, context))

    def _capture(self, key: tuple[int, int], extent: int, work: Callable[[], None]) -> _Graph | None:
        """The graph of a cell, or None if the cell must be computed without one."""
        if self._refused or key not in self._computed:
            return None
        try:
            self._captured[key] = _Graph(extent, self._device.graphs.capture(work))
        except RuntimeError as error:
            self._refused = True
            self._captured.clear()
            _log.warning(
                "%s refused to capture a CUDA graph (%s), so flexgen launches each kernel separately: "
                "results are the same, but small batches take longer",
                self._device.name,
                shown(str(error).partition("\n")[0]),
            )
            return None
        return self._captured[key]

    def _step(self, cell: BoundCell, x: Tensor) -> _Step:
        batch = cell.batch
        if batch not in self._steps:
            layout = step_layout([*self._layers.values()], self._segments, len(x), x.dtype)
            if batch not in self._buffers:  # batches never grow
                self._buffers[batch] = self._taken.buffer(self._device.memory, layout.nbytes, "CUDA graphs")
            self._steps[batch] = _Step(self._buffers[batch], layout)
        return self._steps[batch]
