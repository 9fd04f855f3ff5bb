"""How one head's key or value of one token lies in a page of the KV cache: as it is, or as group-wise integers.

Encoded, a head is one run of bytes: a scale and a minimum (float16) for each group, then the codes. A page is
an array of such runs, so it is filled token by token, moves as one block and is attended where it lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.kernels.groupwise import decode_workspace, dequantise, quantise
from flexgen.kernels.packed import Packed
from flexgen.units import align

_PIECE_VALUES = 1 << 22
"""Encoded at once in torch, and on a CPU decoded, so that what it needs meanwhile stays small."""

_GPU_VALUES = 1 << 27
"""Decoded at once on a GPU: smaller pieces wait for their launches."""

_WORKSPACE = 18
"""Bytes a value that encoding takes meanwhile: codes, and float32 values, steps and their rounding."""

_WORD = 4
"""Bytes of a scale with its minimum. Heads begin at multiples of it, so that torch can view them."""


class HeadFormat(ABC):
    """Heads of `head_dim` values, kept as `width` elements of `dtype`."""

    head_dim: int
    dtype: torch.dtype
    bits: int
    group: int

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of a head."""
        return self.width * self.dtype.itemsize

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(rows, heads, tokens, width) of x (rows, heads, tokens, head_dim), which is finite; on its device."""

    @abstractmethod
    def decode(self, kept: Tensor, tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Contiguous (rows, heads, n, head_dim) of `kept`, (rows, heads, page_tokens, width), in order of tokens.

        They hold at least the first `tokens` tokens; what lies beyond is finite if it is so in memory.
        """

    @abstractmethod
    def encode_both(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` of keys and values of one shape; few of them together, which takes half of the launches."""

    @abstractmethod
    def rows_at_once(self, kept: Tensor, tokens: int) -> int:
        """How many rows of `kept` are decoded together by `whole`, within `decode_bytes`."""

    @abstractmethod
    def whole(self, kept: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """(rows, heads, tokens, head_dim): the first `tokens` tokens of `kept`, decoded at once."""

    @abstractmethod
    def workspace_bytes(self, heads: int, tokens: int) -> int:
        """Of `encode`, and of `decode` on a CPU, for `heads` heads (rows * kv_heads) of `tokens` tokens, with the
        result."""

    @abstractmethod
    def decode_bytes(self, heads: int, tokens: int, dtype: torch.dtype) -> int:
        """Of keys and values that a GPU has decoded at once, `heads` heads of `tokens` tokens in all."""


@dataclass(frozen=True)
class PlainHeads(HeadFormat):
    """Kept as they are computed."""

    head_dim: int
    dtype: torch.dtype
    bits: int = 0
    group: int = 0

    @property
    def width(self) -> int:
        return self.head_dim

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, kept: Tensor, tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        yield kept  # the whole page: a batched product on a slice is ten times slower on a CPU

    def encode_both(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def rows_at_once(self, kept: Tensor, tokens: int) -> int:
        return len(kept)

    def whole(self, kept: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        return kept[:, :, :tokens]

    def workspace_bytes(self, heads: int, tokens: int) -> int:
        return 0

    def decode_bytes(self, heads: int, tokens: int, dtype: torch.dtype) -> int:
        return 0


@dataclass(frozen=True)
class GroupwiseHeads(HeadFormat):
    """Integers of `bits` bits (4 or 8), with a scale and a minimum for each `group` values.

    `group` divides head_dim, the dimension that a query is summed over, and its codes are whole bytes.
    """

    head_dim: int
    bits: int
    group: int
    dtype: torch.dtype = torch.uint8

    @property
    def _codes(self) -> int:
        return self.head_dim // self.group * _WORD  # where they begin

    @property
    def width(self) -> int:
        return align(self._codes + self.head_dim * self.bits // 8, _WORD)

    def encode(self, x: Tensor) -> Tensor:
        # What aligns a head is zero, so that equal heads are equal bytes.
        kept = torch.zeros(*x.shape[:-1], self.width, dtype=torch.uint8, device=x.device)
        step = self._step(x.shape[0] * x.shape[1])
        for part, target in zip(x.split(step, dim=2), kept.split(step, dim=2), strict=True):
            packed, view = quantise(part, self.bits, self.group), self._view(target)
            view.values.copy_(packed.values)
            view.scales.copy_(packed.scales)
            view.minimums.copy_(packed.minimums)
        return kept

    def decode(self, kept: Tensor, tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        # No further than `tokens`: bytes that were never written may not be numbers.
        most = _PIECE_VALUES if kept.device.type == "cpu" else _GPU_VALUES
        for part in kept[:, :, :tokens].split(self._step(kept.shape[0] * kept.shape[1], most), dim=2):
            yield self._decoded(part, dtype)

    def encode_both(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.numel() > _PIECE_VALUES // 2:
            return self.encode(k), self.encode(v)
        both = self.encode(torch.cat((k, v)))
        return both[: len(k)], both[len(k) :]

    def rows_at_once(self, kept: Tensor, tokens: int) -> int:
        return max(1, _GPU_VALUES // max(1, kept.shape[1] * tokens * self.head_dim))

    def whole(self, kept: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        return self._decoded(kept[:, :, :tokens], dtype)

    def _decoded(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(*kept.shape[:-1], self.head_dim, dtype=dtype, device=kept.device)
        return dequantise(self._view(kept), out)

    def workspace_bytes(self, heads: int, tokens: int) -> int:
        at_once = min(self._step(heads), tokens)
        return heads * (at_once * self.head_dim * _WORKSPACE + tokens * self.width)

    def decode_bytes(self, heads: int, tokens: int, dtype: torch.dtype) -> int:
        values = min(heads * tokens * self.head_dim, max(_GPU_VALUES, tokens * self.head_dim))
        return 2 * values * dtype.itemsize + decode_workspace(values, self.group)

    def _step(self, heads: int, most: int | None = None) -> int:
        return max(1, (most or _PIECE_VALUES) // max(1, heads * self.head_dim))

    def _view(self, kept: Tensor) -> Packed:
        pairs = kept[..., : self._codes].view(torch.float16).unflatten(-1, (-1, 2))
        codes = self._codes + self.head_dim * self.bits // 8
        return Packed(kept[..., self._codes : codes], pairs[..., 0], pairs[..., 1], self.bits, self.group)
