"""What each step of a schedule does for one block of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from flexgen.memory.transfer import Chains, Stage
from flexgen.memory.weights import WeightSlots
from flexgen.models import Chunk, Layer
from flexgen.models.ops import causal_attention
from flexgen.runtime.activations import Activations
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.pages import Padding, Span
from flexgen.runtime.tokens import Output, Prompts
from flexgen.schedule import Grid, Op, Step
from flexgen.trace import LaneName


@dataclass(frozen=True)
class _Cell:
    """The `Context` that a layer computes in."""

    positions: Tensor
    last_only: bool
    cache: KVCache
    layer: int
    batch: int
    slot: int
    span: Span
    padding: Padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.cache.attend(self.layer, self.batch, self.slot, self.span, q, k, v, self.padding, scale)

    def keep_prompt(self, k: Tensor, v: Tensor) -> None:
        self.cache.keep(self.layer, self.batch, self.slot, self.span, k, v)

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen = (chunk.rows, slice(None), slice(chunk.tokens.stop))
        return causal_attention(q, k[seen], v[seen], self.padding.starts[chunk.rows], scale)


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
        first: int = 0,
    ) -> None:
        """`first`: the token of the text that the grid's first token is. Those before it are in the cache."""
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
        self._positions: dict[int, Tensor] = {}
        self._run = object()  # tells this generation's visits from all others'; an id could come again

    @property
    def can_finish(self) -> bool:
        return self._output.can_finish

    def finished(self, token: int) -> bool:
        self.following = self._output.following(self.first + token)
        if self.following is None:
            return False
        self.next = self.first + token + 1
        return True

    def chains(self, step: Step) -> Chains:
        """The work of a step; empty where nothing has to move."""
        op, i, j, k = step
        if op is Op.LOAD_WEIGHTS:
            return self._weights.chains(j, self.grid.weight_slot(i, j), k, self.grid.weight_pieces)
        slot, i = self.grid.cell_slot(i, j, k), self.first + i
        span = self._prompts.span(i, k)
        match op:
            case Op.LOAD_CACHE:
                return self._cache.load(j, k, slot, span.length) if self._layers[j].has_cache else ()
            case Op.LOAD_HIDDEN:
                return self._activations.load(k, slot, span.new) if j else self._prompts.load(i, k, slot)
            case Op.STORE_HIDDEN:
                if j == self._last:
                    return self._output.store(i, k, slot)
                return self._activations.store(k, slot, span.new)
            case Op.STORE_CACHE:
                return self._cache.store(j, k, slot, span) if self._layers[j].has_cache else ()
            case _:
                return ((Stage(LaneName.COMPUTE, partial(self._compute, step, slot, span)),),)

    def _compute(self, step: Step, slot: int, span: Span) -> None:
        _, i, j, k = step
        if j == 0:
            self._positions[k] = self._prompts.positions(self.first + i, k)
            x = self._prompts.take(self.first + i, k, slot)
        else:
            x = self._activations.take(k, slot, span.new)
        weights = self._weights.weights(j, self.grid.weight_slot(i, j), visit=(self._run, i, j))
        padding = self._prompts.padding[k]
        cell = _Cell(self._positions[k], self._output.last_only, self._cache, j, k, slot, span, padding)
        y = self._layers[j].forward(x, weights, cell)
        if j == self._last:
            self._output.keep(k, slot, y)
        else:
            self._activations.keep(k, slot, y)
