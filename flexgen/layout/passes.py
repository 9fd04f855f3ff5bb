"""Which tokens of its prompts a block computes in each pass through the layers."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.layout.cache import Span


@dataclass(frozen=True)
class Passes:
    """The passes of texts whose prompts have `width` tokens, the longest of the block's first.

    A pass is named by the new token that it gives: 0 is the first one. With `chunk`, a pass computes at most that
    many tokens of each prompt. Passes over the parts before the last one give no token; they are numbered below 0.
    Prompts are cut from their end, so that the first new token of every batch comes from the same pass.

    `cached`: tokens before the prompts that are in the cache already.
    """

    width: int
    chunk: int = 0
    cached: int = 0

    @property
    def first(self) -> int:
        """The number of the first pass."""
        return 1 - self._parts(self.width)

    @property
    def new(self) -> int:
        """The most tokens of a row that a pass computes."""
        return min(self.width, self.chunk or self.width)

    @property
    def extends(self) -> bool:
        """Whether passes compute several tokens after cached ones."""
        return self.new < self.width

    def span(self, token: int, width: int | None = None) -> Span:
        """What a pass computes of prompts of `width` tokens, which is at most that of the block; no new token where
        such prompts have fewer parts."""
        width = width or self.width
        if token > 0:
            return Span(self.cached + width + token - 1, 1)
        parts = self._parts(width)
        part = parts - 1 + token
        if part < 0:
            return Span(self.cached, 0)
        begin, end = (width * n // parts for n in (part, part + 1))
        return Span(self.cached + begin, end - begin)

    def _parts(self, width: int) -> int:
        return -(-width // self.chunk) if self.chunk else 1
