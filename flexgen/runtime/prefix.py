"""A shared prefix in a run: its cache, and its loads with the weights of each layer.

A block of one row has computed the cache. `layout/prefix.py` has the places of its data.
"""

from __future__ import annotations

import torch

from flexgen.layout.prefix import prefix_span
from flexgen.memory.transfer import Chains
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.prefix_pages import PrefixPage, PrefixPages


class SharedPrefix:
    """The cache of the first `length` tokens of all rows of a call.

    cache: the cache of the block that has computed them, with a cell slot for each weight slot. `close` releases it.
    """

    def __init__(self, cache: KVCache, length: int) -> None:
        self.length = length
        self.close = cache.close
        self._cache = cache
        none = torch.zeros(1, dtype=torch.int64)
        self._padding = Padding((0,), none, none)
        self._pages: dict[tuple[int, int], PrefixPages] = {}

    def loads(self, layer: int) -> bool:
        """Whether the prefix of the layer moves. layer: one with a cache, here and below."""
        return self._cache.loads(layer, 0)

    def load(self, layer: int, slot: int) -> Chains:
        """The work that loads the prefix of a layer for one visit. slot: that of the layer's weights."""
        return self._cache.load(self._cell(layer, slot))

    def pages(self, layer: int, slot: int) -> PrefixPages:
        """The prefix of a layer on the compute device, after `load`. The pages are the same for every visit."""
        key = layer, slot
        if key not in self._pages:
            cached, pages = self._cache.cached(self._cell(layer, slot)), []
            base = cached.base
            for k, v in cached.pages:
                tokens = min(k.shape[2], self.length - base)
                pages.append(PrefixPage(k[0, :, :tokens], v[0, :, :tokens], base))
                base += tokens
            self._pages[key] = PrefixPages(self.length, tuple(pages))
        return self._pages[key]

    def _cell(self, layer: int, slot: int) -> BoundCell:
        return BoundCell(0, layer, 0, slot, prefix_span(self.length), self._padding)
