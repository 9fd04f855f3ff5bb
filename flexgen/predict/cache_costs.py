"""The moves of a block's KV cache."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen.layout.cache import CacheLayout, CacheSegment, Span, cache_layout
from flexgen.layout.passes import Passes
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Policy, Tier
from flexgen.predict.loads import Loads
from flexgen.predict.placed import PlacedModel
from flexgen.workload import Workload


class CacheCosts:
    """The cache of batches of the given `sizes`.

    every_token: whether all tokens of the block are timed. Otherwise the bytes that a token reads of a cache on disk
        are interpolated linearly, without the steps of whole pages.
    """

    def __init__(
        self, model: PlacedModel, policy: Policy, workload: Workload, sizes: Iterable[int], every_token: bool
    ) -> None:
        self._model = model
        self._passes = Passes.expected(workload, policy)
        self._prompt = self._passes.width
        self._capacity = self._prompt + workload.gen_len
        self._every_token = every_token
        dtype, topology = model.placement.dtype, model.hardware.topology
        columns = Passes.of(workload, policy).capacity(workload.gen_len)
        self._layouts = {
            (n, rows): cache_layout(layer.layer_spec.attention, policy, rows, columns, dtype, topology)
            for n in set(model.alike.cells)
            if isinstance(layer := model.layers[n], AttentionLayer)
            for rows in sizes
        }

    def layout(self, layer: int, rows: int) -> CacheLayout:
        """The layout of a batch of `rows` rows. `layer` is the first of the equal layers."""
        return self._layouts[layer, rows]

    def load(self, layer: int, token: int, rows: int) -> Loads:
        """The loads that bring cached tokens to the place of attention."""
        if (layer, rows) not in self._layouts:
            return ()
        layout, span = self._layouts[layer, rows], self._passes.span(token)
        return self._model.lanes.loads(
            layout.inward(s, span, *self._pages(s, token, span.length)) for s in layout.moving(span)
        )

    def store(self, layer: int, token: int, rows: int, flushes: bool) -> Loads:
        """The loads that store new keys and values. `flushes`: the token represents those that write pages."""
        if (layer, rows) not in self._layouts:
            return ()
        layout, span = self._layouts[layer, rows], self._passes.span(token)
        return self._model.lanes.loads(
            layout.outward(segment, span, self._flushed(segment, span, flushes))
            for segment in layout.segments
        )

    @property
    def flushes(self) -> int:
        """The number of tokens of the decode that write pages of a cache on disk."""
        on_disk = (s for layout in self._layouts.values() for s in layout.segments if s.tier is Tier.DISK)
        return max(map(self._flushes_of, on_disk), default=0)

    def _pages(self, segment: CacheSegment, token: int, cached: int) -> tuple[int, int]:
        """The bytes of the whole pages of `cached` tokens, and of the page that is being filled."""
        if self._every_token or segment.tier is not Tier.DISK or segment.window is not None or token <= 0:
            return segment.filled(cached)
        # A line with the mean of the steps and nearly the same slope.
        later = range(self._prompt, self._capacity - 1)
        both = [divmod(tokens, segment.page_tokens) for tokens in later]
        mean = sum(whole for whole, _ in both) / len(both)
        grown = (both[-1][0] - both[0][0]) * ((cached - self._prompt) / (len(both) - 1) - 0.5)
        filled = sum(bool(rest) for _, rest in both) / len(both)
        return int((mean + grown) * segment.page_bytes), int(filled * segment.page_bytes)

    def _flushed(self, segment: CacheSegment, span: Span, flushes: bool) -> int:
        """The bytes of the pages that became whole."""
        if self._every_token or span.length < self._prompt:
            return segment.flushed(span)
        if segment.tier is not Tier.DISK or not flushes or not self.flushes:
            return 0
        # One token represents all that write pages. A cache with larger pages writes fewer of them.
        return segment.page_bytes * self._flushes_of(segment) // self.flushes

    def _flushes_of(self, segment: CacheSegment) -> int:
        return (self._capacity - 1) // segment.page_tokens - self._prompt // segment.page_tokens
