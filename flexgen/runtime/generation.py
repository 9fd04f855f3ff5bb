"""What each step of a schedule does for one block of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flexgen.layout.cache import Span
from flexgen.memory.transfer import Chains, Stage
from flexgen.memory.weights import WeightSlots
from flexgen.models import Chunk, Layer, Weights
from flexgen.models.embed import Head
from flexgen.models.layer import AttentionLayer
from flexgen.models.ops import rope_tables, token_factors
from flexgen.models.spec import RopeSpec
from flexgen.results.trace import LaneName
from flexgen.runtime.activations import Activations
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.graphs import CellGraphs
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.lookup import Lookup
from flexgen.runtime.pages import Padding
from flexgen.runtime.tokens import Output, Prompts
from flexgen.schedule.steps import Grid, Op, Step


@dataclass(frozen=True)
class _Cell:
    """The `Context` that a layer computes in."""

    positions: Tensor
    text_length: Tensor | None
    last_only: bool
    cache: KVCache
    layer: int
    batch: int
    slot: int
    span: Span
    padding: Padding
    factors: dict[tuple[RopeSpec, torch.dtype], Tensor]
    """Of the token, for all layers."""

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        key = rope, dtype
        if key not in self.factors:
            self.factors[key] = token_factors(*rope_tables(rope, self.positions, dtype, self.text_length))
        return self.factors[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.cache.attend(self.layer, self.batch, self.slot, self.span, q, k, v, self.padding, scale)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        self.cache.keep(self.layer, self.batch, self.slot, self.span, k, v)

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        place = self.layer, self.batch, self.slot, self.span, chunk
        return self.cache.attend_chunk(*place, q, k, v, self.padding, scale)


@dataclass(frozen=True)
class _Half:
    """What a layer's first half leaves to the second, on the compute device."""

    x: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    attended: Sequence[Tensor] = ()


class Generation:
    """The state of one block, and the work of each step on it: what the executor calls."""

    def __init__(
        self,
        grid: Grid,
        layers: Sequence[Layer],
        weights: WeightSlots,
        prompts: Prompts,
        cache: KVCache,
        activations: Activations,
        output: Output,
        lookup: Lookup | None = None,
        first: int = 0,
        graphs: CellGraphs | None = None,
    ) -> None:
        """`first`: the token that the grid's first pass gives, as of `Passes`. Those before it are in the cache."""
        self.grid = grid
        self.first = first
        self.following: list[list[int]] | None = None
        """Where the run has ended early: the rows of each batch that go on, [] if none does."""
        self.next = first + grid.tokens
        """The token of the text that comes after this run."""
        self._layers = layers
        self._last = len(layers) - 1
        self._weights = weights
        self._prompts = prompts
        self._cache = cache
        self._activations = activations
        self._output = output
        self._lookup = lookup
        self._graphs = graphs
        self._positions: dict[int, Tensor] = {}
        self._text_lengths: dict[int, Tensor | None] = {}
        self._factors: dict[int, dict[tuple[RopeSpec, torch.dtype], Tensor]] = {}
        self._halves: dict[int, _Half] = {}  # by slot, from PROJECT to COMPUTE
        self._run = object()  # tells this generation's visits from all others'; an id could come again

    @property
    def can_finish(self) -> bool:
        return self._output.can_finish

    def finished(self, token: int) -> bool:
        if self.first + token < 0:
            return False
        self.following = self._output.following(self.first + token)
        if self.following is None:
            return False
        self.next = self.first + token + 1
        return True

    def chains(self, step: Step) -> Chains:
        """The work of a step; empty where nothing has to move."""
        op, i, j, k = step
        if op is Op.LOAD_WEIGHTS:
            return self._weights.chains(j, self._weights.turns.slot(i, j), k, self.grid.weight_pieces)
        slot, i = self.grid.cell_slot(i, j, k), self.first + i
        span = self._prompts.span(i, k)
        if not span.new or (j == self._last and i < 0):
            return ()  # a batch of shorter prompts, which begin in a later pass; the head, where no token follows
        match op:
            case Op.LOAD_CACHE:
                return self._cache.load(j, k, slot, span) if self._layers[j].has_cache else ()
            case Op.LOAD_HIDDEN:
                if j:
                    return self._activations.load(k, slot, span.new)
                if self._lookup is not None:
                    return self._lookup.load(self._prompts.source(i, k), slot)
                if self._fed(i):
                    return ()
                return self._prompts.load(i, k, slot)
            case Op.STORE_HIDDEN:
                hidden = self._output.store_hidden(j, k, slot)
                if j == self._last:
                    return self._output.store(i, k, slot) + hidden
                return self._activations.store(k, slot, span.new) + hidden
            case Op.STORE_CACHE:
                return self._cache.store(j, k, slot, span) if self._layers[j].has_cache else ()
            case Op.PROJECT | Op.ATTEND | Op.LOAD_ATTENDED:
                return self._attention(step, slot, span) if self._splits(step, span) else ()
            case _:
                work = self._finish if self._splits(step, span) else self._compute
                return ((Stage(LaneName.COMPUTE, partial(work, step, slot, span)),),)

    # A whole layer

    def _compute(self, step: Step, slot: int, span: Span) -> None:
        _, _, j, k = step
        x, weights = self._input(step, slot, span), self._taken(step)
        if j == 0 and self._lookup is not None:
            x, rows = self._lookup.take(x.shape, slot)
            weights = {**weights, self._lookup.name: rows}
        layer = self._layers[j]
        if self._graphs is not None and not self._output.wants_hidden(j):
            bound = BoundCell(self.first + step.token, j, k, slot, span, self._prompts.padding[k])
            if self._graphs.serves(bound):
                context = self._cell(step, slot, span)
                self._keep(step, slot, self._graphs.compute(bound, context, x, weights))
                return
        if isinstance(layer, Head) and self._output.wants_hidden(j):
            self._output.keep_hidden(j, slot, layer.final(x, weights))
        self._keep(step, slot, layer.forward(x, weights, self._cell(step, slot, span)))

    # A layer in halves, with attention between

    def _splits(self, step: Step, span: Span) -> bool:
        _, _, j, k = step
        return self.grid.splits_attention and self._layers[j].has_cache and self._cache.asks_host(j, k, span)

    def _attention(self, step: Step, slot: int, span: Span) -> Chains:
        op, _, j, k = step
        host = self._cache.host
        match op:
            case Op.PROJECT:
                project = partial(self._project, step, slot, span)
                send = partial(host.send, j, k, slot)
                return ((Stage(LaneName.COMPUTE, project), Stage(LaneName.FROM_DEVICE, send)),)
            case Op.ATTEND:
                padding, scale = self._prompts.padding[k], self._attention_layer(j).scale
                there = partial(self._cache.attend_on_host, j, k, slot, span, padding, scale)
                chains: Chains = ((Stage(LaneName.HOST, there),),)
                if self._cache.asks_device(j, k):
                    chains += ((Stage(LaneName.COMPUTE, partial(self._attend, step, slot, span)),),)
                return chains
            case _:
                return ((Stage(LaneName.TO_DEVICE, partial(host.fetch, j, k, slot)),),)

    def _project(self, step: Step, slot: int, span: Span) -> None:
        _, _, j, k = step
        x = self._input(step, slot, span)
        qkv = self._attention_layer(j).qkv(x, self._taken(step), self._cell(step, slot, span))
        self._cache.host.collect(j, k, slot, *qkv)
        self._halves[slot] = _Half(x, qkv)

    def _attend(self, step: Step, slot: int, span: Span) -> None:
        _, _, j, k = step
        half, padding = self._halves[slot], self._prompts.padding[k]
        scale = self._attention_layer(j).scale
        attended = self._cache.attend_on_device(j, k, slot, span, *half.qkv, padding, scale)
        self._halves[slot] = replace(half, attended=attended)

    def _finish(self, step: Step, slot: int, span: Span) -> None:
        _, _, j, k = step
        half = self._halves.pop(slot)
        attended = self._cache.join(j, k, slot, span, half.attended)
        self._keep(step, slot, self._attention_layer(j).output(attended, half.x, self._taken(step)))

    def _attention_layer(self, j: int) -> AttentionLayer:
        layer = self._layers[j]
        assert isinstance(layer, AttentionLayer)
        return layer

    # What a layer takes and gives

    def _fed(self, token: int) -> bool:
        """Whether the ids that the token reads are on the device, from the token before it in this run."""
        return self.grid.feeds_ids and token > max(self.first, 0)

    def _input(self, step: Step, slot: int, span: Span) -> Tensor:
        _, i, j, k = step
        if j == 0:
            i += self.first
            self._positions[k] = self._prompts.positions(i, k)
            self._text_lengths[k] = self._prompts.text_length(i, k)
            self._factors[k] = {}
            return self._prompts.fed(k) if self._fed(i) else self._prompts.take(i, k, slot)
        return self._activations.take(k, slot, span.new)

    def _taken(self, step: Step) -> Weights:
        _, i, j, _ = step
        return self._weights.weights(j, self._weights.turns.slot(i, j), visit=(self._run, i, j))

    def _cell(self, step: Step, slot: int, span: Span) -> _Cell:
        _, _, j, k = step
        padding = self._prompts.padding[k]
        return _Cell(
            self._positions[k],
            self._text_lengths[k],
            self._output.last_only,
            self._cache,
            j,
            k,
            slot,
            span,
            padding,
            self._factors[k],
        )

    def _keep(self, step: Step, slot: int, y: Tensor) -> None:
        _, i, j, k = step
        if j == self._last:
            self._output.keep(self.first + i, k, slot, y)
        else:
            self._activations.keep(k, slot, y)
            if self._output.wants_hidden(j):
                self._output.keep_hidden(j, slot, y)
