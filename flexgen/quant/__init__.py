"""Codecs: how a tensor is kept and moved in fewer bytes. A codec is no device: any tier may use any codec."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.kernels.heads import HeadFormat, PlainHeads
from flexgen.quant.codec import Codec
from flexgen.quant.codecs import CODECS

__all__ = ["CODECS", "Codec", "codec_for", "head_format"]


def codec_for(name: str, shape: Sequence[int]) -> Codec | None:
    """The codec that a share's name asks for, or None where a tensor of this shape is kept as it is."""
    codec = CODECS.get(name)
    return codec if codec is not None and codec.fits(shape) else None


def head_format(name: str, head_dim: int, dtype: torch.dtype) -> HeadFormat:
    """How the KV cache keeps heads, computed in `dtype`, under the codec that a share names.

    Raises PolicyError where the codec cannot keep heads of this size.
    """
    return CODECS[name].heads(head_dim) if name in CODECS else PlainHeads(head_dim, dtype)
