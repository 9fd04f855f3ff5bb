"""The computation of a block's cells, on the device and on the host."""

from __future__ import annotations

from typing import NamedTuple

from flexgen.layout.passes import Passes
from flexgen.models.layer import AttentionLayer
from flexgen.predict.cache_costs import CacheCosts
from flexgen.predict.fixed_costs import FixedCosts
from flexgen.predict.loads import Load, Loads
from flexgen.predict.placed import PlacedModel
from flexgen.results.trace import LaneName


class CostedCell(NamedTuple):
    """A cell of `rows` rows, of which `attending` get a token. joint: the tokens of all cells that one call computes
    with it, and their rows; (0, 0) if it is computed alone."""

    rows: int
    attending: int
    joint: tuple[int, int] = (0, 0)


class ComputeCosts:
    """The computation of cells, whole or in the steps of an order that `splits_attention`.

    A layer is identified by the first of the equal layers. `first`: whether the batch is the first of a visit.
    `attending`: the number of `rows` that get a token; attention on the CPU does not read the cache of the others.

    gathers_rows: whether the rows of an encoded table were gathered, each once.
    """

    def __init__(
        self,
        model: PlacedModel,
        cache: CacheCosts,
        passes: Passes,
        splits_attention: bool,
        gathers_rows: bool,
        fixed: FixedCosts,
    ) -> None:
        self._model = model
        self._cache = cache
        self._passes = passes
        self._splits_attention = splits_attention
        self._gathers_rows = gathers_rows
        self._fixed = fixed

    def compute(self, index: int, token: int, cell: CostedCell, first: bool) -> Loads:
        """The computation of the layer, without the parts that PROJECT and ATTEND have computed."""
        model, span = self._model, self._passes.span(token)
        rows, attending, _ = cell
        layer, arithmetic = model.layers[index], model.arithmetic
        if index == model.last and token < 0:
            return ()
        # The head computes the last position of a prompt only.
        new = 1 if index == model.last and token <= 0 else span.new
        seconds = self._products(index, cell, new, first) + self._embedded(index, rows * new)
        crossed = 0
        if self._splits(index, token, rows):
            assert isinstance(layer, AttentionLayer)
            seconds -= arithmetic.projection(layer, rows, first)
            return ((Load(LaneName.COMPUTE, 0, seconds + self._fixed.after_attention),),)
        if layer.has_cache and not span.decodes:
            context = self._passes.shared + span.length + new
            seconds += arithmetic.prompt_attention(layer, rows, new, context)
        elif layer.has_cache:
            # Device and host compute attention of their rows in parallel. Queries and attention outputs cross the
            # link within the computation.
            layout = self._cache.layout(index, rows)
            device, host = self._token_attention(index, token, rows, attending)
            seconds += max(device, host)
            if any(segment.codec != "none" for segment in layout.segments):
                seconds += self._model.hardware.fixed.encoded
            if layout.host_rows:
                for move in (layout.ask(new), layout.answer(bool(self._passes.shared), new)):
                    crossed += move.nbytes
                    seconds += model.lanes.seconds(move)
        seconds += self._fixed.of_cell(index, token)
        return ((Load(LaneName.COMPUTE, crossed, seconds),),)

    def _products(self, index: int, cell: CostedCell, new: int, first: bool) -> float:
        """Seconds of the products for `new` tokens of each row: the cell's share of those of its joint cells."""
        layer, products = self._model.layers[index], self._model.arithmetic.products
        together = cell.joint[index == self._model.last]
        if not together or not index:
            return products(layer, cell.rows, new, first)
        return products(layer, together, 1, first) * cell.rows * new / together

    def project(self, index: int, token: int, rows: int, first: bool) -> Loads:
        """Compute queries, keys and values, and copy those of the host's rows to the host."""
        if not self._splits(index, token, rows):
            return ()
        layer = self._model.layers[index]
        assert isinstance(layer, AttentionLayer)
        seconds = self._fixed.before_attention + self._model.arithmetic.projection(layer, rows, first)
        new = self._passes.span(token).new
        ask = self._model.lanes.load(self._cache.layout(index, rows).ask(new))
        return ((Load(LaneName.COMPUTE, 0, seconds), ask),)

    def attend(self, index: int, token: int, rows: int, attending: int) -> Loads:
        """Compute attention of the host's rows on the host, and of the other rows on the device."""
        if not self._splits(index, token, rows):
            return ()
        segments = self._cache.layout(index, rows).segments
        device, host = self._token_attention(index, token, rows, attending)
        chains: Loads = ((Load(LaneName.HOST, 0, host),),)
        if self._passes.shared or any(segment.on_device for segment in segments):
            chains += ((Load(LaneName.COMPUTE, 0, device),),)
        return chains

    def _token_attention(self, index: int, token: int, rows: int, attending: int) -> tuple[float, float]:
        """Seconds of attention of one token of each row and its guesses, on the device and on the host."""
        span, layout = self._passes.span(token), self._cache.layout(index, rows)
        layer = self._model.layers[index]
        assert isinstance(layer, AttentionLayer)
        own = layer.layer_spec.attention
        arithmetic, sharing = self._model.arithmetic, own.heads // own.kv_heads
        read = self._cache.layout(index, attending)
        tokens = span.length + 1, span.new, sharing
        device, host = arithmetic.token_attention(read.segments, *tokens)
        if not self._model.hardware.topology.shares_host_memory:  # torch reads the cache of all rows
            device, _ = arithmetic.token_attention(layout.segments, *tokens)
        if layout.host_rows:
            host += self._model.hardware.fixed.attend
        return device + self._prefix_attention(index, rows * span.new), host

    def _prefix_attention(self, index: int, rows: int) -> float:
        """Seconds of attention of one token of each row over the shared prefix, on the device."""
        shared, layer = self._passes.shared, self._model.layers[index]
        if not shared:
            return 0.0
        assert isinstance(layer, AttentionLayer)
        return self._model.arithmetic.prefix_attention(layer, rows, shared)

    def load_attention(self, index: int, token: int, rows: int) -> Loads:
        """Copy the host's attention output to the device."""
        if not self._splits(index, token, rows):
            return ()
        layout, new = self._cache.layout(index, rows), self._passes.span(token).new
        return ((self._model.lanes.load(layout.answer(bool(self._passes.shared), new)),),)

    def _splits(self, index: int, token: int, rows: int) -> bool:
        """Whether a cell is computed in two steps, with attention on the host between them."""
        if not (self._splits_attention and self._model.layers[index].has_cache):
            return False
        return self._passes.span(token).decodes and bool(self._cache.layout(index, rows).host_rows)

    def _embedded(self, index: int, tokens: int) -> float:
        """Seconds of decoding the rows of an encoded table: one for each id, or each gathered row once."""
        model = self._model
        table = model.layers[index].table
        codec = model.placement.codec(table) if table else None
        if table is None or codec is None:
            return 0.0
        rows = min(tokens, table.shape[0]) if self._gathers_rows else tokens
        return model.arithmetic.decoding(codec, rows * table.shape[1])
