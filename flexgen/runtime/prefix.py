"""A shared prefix in a run: its cache, and its loads with the weights of each layer.

A block of one row has computed the cache of each of its parts. `layout/prefix.py` has the places of its data.
"""

from __future__ import annotations

import torch

from flexgen.layout.prefix import prefix_span
from flexgen.memory.transfer import Chains
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.prefix_pages import PrefixPage, PrefixPages


class SharedPrefix:
    """The cache of the first `length` tokens of all rows of a block.

    cache: the cache of the block that has computed the last part of them, with a cell slot for each weight slot.
    before: the prefix of this block, with the other parts. row: the prompt whose ids are those of the last part.
    """

    def __init__(self, cache: KVCache, length: int, before: SharedPrefix | None = None, row: int = 0) -> None:
        self.length = length
        self.before = before
        self.row = row
        self._begin = before.length if before else 0
        self._cache = cache
        none = torch.zeros(1, dtype=torch.int64)
        self._padding = Padding((0,), none, none)
        self._pages: dict[tuple[int, int], PrefixPages] = {}

    def close(self) -> SharedPrefix | None:
        """Release the memory of the last part. Returns the prefix without it."""
        self._cache.close()
        return self.before

    @property
    def parts(self) -> tuple[SharedPrefix, ...]:
        """The prefix after each of its parts."""
        return (*self.before.parts, self) if self.before else (self,)

    @property
    def tokens(self) -> range:
        """The tokens of the last part."""
        return range(self._begin, self.length)

    def loads(self, layer: int) -> bool:
        """Whether the prefix of the layer moves. layer: one with a cache, here and below."""
        return any(part._cache.loads(layer, 0) for part in self.parts)

    def load(self, layer: int, slot: int) -> Chains:
        """The work that loads the prefix of a layer for one visit. slot: that of the layer's weights."""
        before = self.before.load(layer, slot) if self.before else ()
        return (*before, *self._cache.load(self._cell(layer, slot)))

    def pages(self, layer: int, slot: int) -> PrefixPages:
        """The prefix of a layer on the compute device, after `load`. The pages are the same for every visit."""
        key = layer, slot
        if key not in self._pages:
            cached = self._cache.cached(self._cell(layer, slot))
            pages = [*self.before.pages(layer, slot).pages] if self.before else []
            base = self._begin + cached.base
            for k, v in cached.pages:
                tokens = min(k.shape[2], self.length - base)
                pages.append(PrefixPage(k[0, :, :tokens], v[0, :, :tokens], base))
                base += tokens
            self._pages[key] = PrefixPages(self.length, tuple(pages))
        return self._pages[key]

    def _cell(self, layer: int, slot: int) -> BoundCell:
        return BoundCell(0, layer, 0, slot, prefix_span(len(self.tokens)), self._padding)
