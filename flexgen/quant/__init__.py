"""Codecs: how a tensor is stored and moved in fewer bytes. Any tier may use any codec."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.errors import PolicyError
from flexgen.kernels.heads import HeadFormat, PlainHeads
from flexgen.policy import STORED
from flexgen.quant.codec import Codec, MatrixCodec
from flexgen.quant.codecs import CODECS
from flexgen.quant.stored import Stored

__all__ = ["CODECS", "Codec", "MatrixCodec", "Stored", "codec_for", "head_format"]


def codec_for(name: str, shape: Sequence[int]) -> Codec | None:
    """The codec of that name, or None if tensors of this shape are stored without one."""
    codec = CODECS.get(name)
    return codec if codec is not None and codec.fits(shape) else None


def head_format(name: str, head_dim: int, dtype: torch.dtype) -> HeadFormat:
    """The format in which the KV cache stores heads, computed in `dtype`, with the codec of that name.

    Raises PolicyError if the codec cannot store heads of this size.
    """
    if name == STORED:
        raise PolicyError(
            f"cache: codec {STORED!r} is the form of a checkpoint's weights, so only weights can have it; use "
            "another codec for the cache"
        )
    return CODECS[name].heads(head_dim) if name in CODECS else PlainHeads(head_dim, dtype)
