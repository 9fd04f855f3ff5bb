"""What a codec answers, and the codecs there are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.errors import PolicyError
from flexgen.kernels.groupwise import decode_workspace, dequantise, quantise
from flexgen.kernels.heads import GroupwiseHeads, HeadFormat, PlainHeads
from flexgen.kernels.packed import Packed
from flexgen.units import align

ENCODING = 1
"""Changes whenever `encode` gives other bytes for the same tensor. Offload directories keep encoded weights; those of
another number are written again."""

_ALIGNMENT = 64
"""Bytes. Parts of an encoded tensor begin at multiples of it: a cache line, the widest vector."""


class Codec(ABC):
    """Keeps a tensor as one run of bytes, so that stores and lanes need not know what is in it."""

    name: str

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether tensors of this shape can be encoded; others are kept as they are."""

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of an encoded tensor."""

    @abstractmethod
    def decode_workspace(self, shape: Sequence[int]) -> int:
        """Bytes that decoding a tensor on a GPU takes at most, in addition to the result."""

    @abstractmethod
    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Where the rows of an encoded matrix lie: for each part, where row 0 begins and the bytes of a row.

        Rows of a part follow one another, so that some rows of a matrix, part by part, are a matrix of so many
        rows in the same form.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """uint8 (nbytes,) on the device of x."""

    @abstractmethod
    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Write the tensor to `out`, contiguous, of the shape that was encoded, rounded to its dtype."""

    @abstractmethod
    def packed(self, encoded: Tensor, shape: Sequence[int]) -> Packed:
        """A tensor of `shape` as it is encoded, in views, for kernels that compute with it undecoded."""

    @abstractmethod
    def heads(self, head_dim: int) -> HeadFormat:
        """How it keeps a head's key or value in the KV cache. Raises PolicyError where it cannot."""


@dataclass(frozen=True)
class Groupwise(Codec):
    """Integers of `bits` bits with a scale and a minimum, in float16, for each `group` values of a row.

    A row is the last dimension, the one that a linear layer sums over (FlexGen, arXiv 2303.06865, section 4.2).
    With 4 bits and groups of 64 a value takes 4.5 bits.
    """

    name: str
    bits: int
    group: int = 64

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and shape[-1] % self.group == 0

    def nbytes(self, shape: Sequence[int]) -> int:
        return self._parts(shape)[-1]

    def decode_workspace(self, shape: Sequence[int]) -> int:
        return decode_workspace(math.prod(shape), self.group)

    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        scales, minimums, _ = self._parts(shape)
        per_group = shape[-1] // self.group * torch.float16.itemsize
        return (0, shape[-1] * self.bits // 8), (scales, per_group), (minimums, per_group)

    def encode(self, x: Tensor) -> Tensor:
        packed = quantise(x, self.bits, self.group)
        encoded = torch.zeros(self.nbytes(x.shape), dtype=torch.uint8, device=x.device)
        view = self.packed(encoded, x.shape)
        view.values.copy_(packed.values)
        view.scales.copy_(packed.scales)
        view.minimums.copy_(packed.minimums)
        return encoded

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        dequantise(self.packed(encoded, out.shape), out)

    def heads(self, head_dim: int) -> HeadFormat:
        """In groups of `group` values where those divide the head, otherwise the head is one group."""
        if head_dim * self.bits % 8:
            raise PolicyError(
                f"cache: codec {self.name!r} keeps heads of an even size, this model's have {head_dim}; "
                "leave the cache as it is"
            )
        return GroupwiseHeads(head_dim, self.bits, head_dim if head_dim % self.group else self.group)

    def _parts(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Where scales and minimums begin, and where the tensor ends, in bytes; values come first."""
        count = math.prod(shape)
        per_group = align(count // self.group * torch.float16.itemsize, _ALIGNMENT)
        scales = align(count * self.bits // 8, _ALIGNMENT)
        return scales, scales + per_group, scales + 2 * per_group

    def packed(self, encoded: Tensor, shape: Sequence[int]) -> Packed:
        *outer, last = shape
        scales, minimums, _ = self._parts(shape)
        groups = (*outer, last // self.group)
        count = math.prod(groups) * torch.float16.itemsize
        values = math.prod(shape) * self.bits // 8
        return Packed(
            values=encoded[:values].view(*outer, last * self.bits // 8),
            scales=encoded[scales : scales + count].view(torch.float16).view(groups),
            minimums=encoded[minimums : minimums + count].view(torch.float16).view(groups),
            bits=self.bits,
            group=self.group,
        )


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Groupwise("int4", 4), Groupwise("int8", 8))}
"""All codecs by the names that a policy uses; "none" is the absence of one."""


def codec_for(name: str, shape: Sequence[int]) -> Codec | None:
    """The codec that a share's name asks for, or None where a tensor of this shape is kept as it is."""
    codec = CODECS.get(name)
    return codec if codec is not None and codec.fits(shape) else None


def head_format(name: str, head_dim: int, dtype: torch.dtype) -> HeadFormat:
    """How the KV cache keeps heads, computed in `dtype`, under the codec that a share names.

    Raises PolicyError where the codec cannot keep heads of this size.
    """
    return CODECS[name].heads(head_dim) if name in CODECS else PlainHeads(head_dim, dtype)
