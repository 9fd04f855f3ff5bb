"""Results of attention: whole, or parts that are merged with attention over a shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.kernels.partial import Partial, merge

AttentionOutput = Tensor | Partial
"""Attention of some rows over all their tokens, (rows, heads, new, head_dim), or over the tokens of their cache."""


class OnDevice(NamedTuple):
    """The device's part of the attention of one token: over the cache of its rows, by tier, and of all rows over each
    page of a shared prefix."""

    own: Sequence[AttentionOutput] = ()
    prefix: Sequence[Partial] = ()


def together(outs: Sequence[AttentionOutput]) -> AttentionOutput:
    """The results of consecutive rows as one."""
    if len(outs) == 1:
        return outs[0]
    whole = [out for out in outs if isinstance(out, Tensor)]
    if whole:
        return torch.cat(whole)
    parts = [out for out in outs if isinstance(out, Partial)]
    return Partial(torch.cat([part.values for part in parts]), torch.cat([part.lse for part in parts]))


def with_prefix(own: AttentionOutput, prefix: Sequence[Partial], dtype: torch.dtype) -> Tensor:
    """Attention over all tokens of the rows: the cache's, and those of each page of the prefix. `own` is whole if
    there is no prefix."""
    return own if isinstance(own, Tensor) else merge([own, *prefix], dtype)
