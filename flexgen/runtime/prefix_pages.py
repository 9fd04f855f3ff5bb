"""The pages of a shared prefix in one layer, and attention over them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flexgen.kernels.partial import Partial
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.shared_prefix import attend_prefix


class PrefixPage(NamedTuple):
    """Keys and values (kv_heads, tokens, head_dim) of the tokens from position `base` on."""

    k: Tensor
    v: Tensor
    base: int


class PrefixPages(NamedTuple):
    """The pages of a prefix of `length` tokens, in the memory of the compute device. If the layer has a window, they
    are those with tokens that later tokens attend to."""

    length: int
    pages: tuple[PrefixPage, ...]

    def attend(self, q: Tensor, scoring: Scoring, positions: Tensor | None) -> list[Partial]:
        """Attention of q (rows, heads, new, head_dim) over each page. scoring, positions: as for `attend_prefix`."""
        return [attend_prefix(q, page.k, page.v, scoring, positions, page.base) for page in self.pages]
