"""Codecs: how a tensor is stored and moved in fewer bytes. Any tier may use any codec."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.kernels.heads import HeadFormat, PlainHeads
from flexgen.quant.codec import Codec
from flexgen.quant.codecs import CODECS

__all__ = ["CODECS", "Codec", "codec_for", "head_format"]


def codec_for(name: str, shape: Sequence[int]) -> Codec | None:
    """The codec of that name, or None if tensors of this shape are stored without one."""
    codec = CODECS.get(name)
    return codec if codec is not None and codec.fits(shape) else None


def head_format(name: str, head_dim: int, dtype: torch.dtype) -> HeadFormat:
    """The format in which the KV cache stores heads, computed in `dtype`, with the codec of that name.

    Raises PolicyError if the codec cannot store heads of this size.
    """
    return CODECS[name].heads(head_dim) if name in CODECS else PlainHeads(head_dim, dtype)
