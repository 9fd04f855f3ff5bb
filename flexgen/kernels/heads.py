"""The storage of one head's key or value of one token in a page of the KV cache: plain or encoded by a codec.

An encoded head is one run of bytes. A page is an array of such runs: it is filled token by token, moves as one
block, and attention reads it in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flexgen.kernels.compiled_attention import HeadLayout, attend_compiled, part_compiled
from flexgen.kernels.groupwise import decode_workspace, dequantise, quantise
from flexgen.kernels.packed import Packed
from flexgen.kernels.partial import Partial
from flexgen.kernels.scoring import Length, Scoring
from flexgen.units import align

_WORD = 4
"""Bytes of a scale and its minimum. Heads begin at multiples of it, so that torch can view them."""


Pages = Sequence[tuple[Tensor, Tensor]]
"""Keys and values, both (rows, kv_heads, page_tokens, width) and contiguous: positions 0, 1, ... in order.

A `HeadFormat` defines the `width` elements of a head. Without one, they are its head_dim values.
"""


class HeadFormat(ABC):
    """Stores heads of `head_dim` values as `width` elements of `dtype`."""

    head_dim: int
    dtype: torch.dtype
    joined_bytes: ClassVar[int] = 1 << 28
    """Bytes of pages that are joined at once on a GPU, where a copy takes far less time than the transfer over the
    link."""

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes per head."""
        return self.width * self.dtype.itemsize

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode x (rows, heads, tokens, head_dim), which is finite, as (rows, heads, tokens, width) on its
        device."""

    @abstractmethod
    def decode(self, stored: Tensor, tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Decode `stored` (rows, heads, page_tokens, width) to contiguous (rows, heads, n, head_dim), in token order.

        The results contain at least the first `tokens` tokens. Values after these are finite if the stored ones are.
        """

    @abstractmethod
    def encode_both(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` of keys and values of the same shape. Encodes small ones together, which halves the launches."""

    @abstractmethod
    def rows_at_once(self, stored: Tensor, tokens: int) -> int:
        """The number of rows of `stored` that `whole` decodes together, within `decode_bytes`."""

    @abstractmethod
    def whole(self, stored: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """The first `tokens` tokens of `stored`, decoded at once: (rows, heads, tokens, head_dim)."""

    @abstractmethod
    def workspace_bytes(self, heads: int, tokens: int) -> int:
        """Bytes of the temporaries and the result of `encode`, and of `decode` on a CPU, for `heads` heads (rows *
        kv_heads) of `tokens` tokens."""

    @abstractmethod
    def decode_bytes(self, heads: int, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values that a GPU decodes at once, for `heads` heads of `tokens` tokens in total."""

    def attend(
        self, q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring
    ) -> Tensor | None:
        """`decode_attention` with a kernel for this format, or None if there is none for the device and dtype of q.

        Without a kernel, torch decodes the pages and computes attention over the decoded values.
        """
        return None

    def attend_part(
        self, q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring
    ) -> Partial | None:
        """The same for `decode_part`."""
        return None

    def expected_attention(self, plain: float, dtype: torch.dtype, on_host: bool) -> float | None:
        """The expected speed of attention over pages in this format in bytes/s, or None if it must be measured.

        plain: the speed for pages of plain values in `dtype`. on_host: whether the cores of the host compute
        attention, not a GPU.
        """
        return None


@dataclass(frozen=True)
class PlainHeads(HeadFormat):
    """Stores heads without a codec."""

    head_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.head_dim

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, stored: Tensor, tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        yield stored  # the whole page: a batched product with a slice is ten times slower on a CPU

    def encode_both(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def rows_at_once(self, stored: Tensor, tokens: int) -> int:
        return len(stored)

    def whole(self, stored: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        return stored[:, :, :tokens]

    def workspace_bytes(self, heads: int, tokens: int) -> int:
        return 0

    def decode_bytes(self, heads: int, tokens: int, dtype: torch.dtype) -> int:
        return 0

    def attend(
        self, q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring
    ) -> Tensor | None:
        return attend_compiled(q, pages, length, starts, scoring, HeadLayout(0, 0, self.nbytes))

    def attend_part(
        self, q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring
    ) -> Partial | None:
        return part_compiled(q, pages, length, starts, scoring, HeadLayout(0, 0, self.nbytes))


@dataclass(frozen=True, kw_only=True)
class EncodedHeads(HeadFormat):
    """Stores each head as one run of bytes that begins at a multiple of 4. Encodes and decodes a few tokens at a
    time.

    encode_bytes: bytes of temporaries per value when encoding.
    piece_values: values encoded at once, and decoded at once on a CPU, which limits the temporaries.
    gpu_values: values decoded at once on a GPU, where launches would dominate the time of smaller pieces.
    """

    encode_bytes: ClassVar[int]
    dtype: torch.dtype = field(default=torch.uint8, init=False, repr=False)
    piece_values: int = field(default=1 << 22, repr=False)
    gpu_values: int = field(default=1 << 27, repr=False)

    @abstractmethod
    def encode_part(self, x: Tensor, stored: Tensor) -> None:
        """Encode x (rows, heads, tokens, head_dim) to `stored` (rows, heads, tokens, width), which is zero-filled."""

    @abstractmethod
    def decode_part(self, stored: Tensor, out: Tensor) -> None:
        """Decode `stored` (rows, heads, tokens, width) to `out` (rows, heads, tokens, head_dim), contiguous."""

    @abstractmethod
    def decode_workspace(self, values: int) -> int:
        """Bytes that `decode_part` allocates on a GPU for `values` values, in addition to the result."""

    def encode(self, x: Tensor) -> Tensor:
        # The bytes that align a head are zero, so that equal heads have equal bytes.
        stored = torch.zeros(*x.shape[:-1], self.width, dtype=torch.uint8, device=x.device)
        step = self._step(x.shape[0] * x.shape[1])
        for part, target in zip(x.split(step, dim=2), stored.split(step, dim=2), strict=True):
            self.encode_part(part, target)
        return stored

    def decode(self, stored: Tensor, tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        # Decode only `tokens` tokens: bytes that were never written may decode to NaN.
        most = self.piece_values if stored.device.type == "cpu" else self.gpu_values
        for part in stored[:, :, :tokens].split(self._step(stored.shape[0] * stored.shape[1], most), dim=2):
            yield self._decoded(part, dtype)

    def encode_both(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.numel() > self.piece_values // 2:
            return self.encode(k), self.encode(v)
        both = self.encode(torch.cat((k, v)))
        return both[: len(k)], both[len(k) :]

    def rows_at_once(self, stored: Tensor, tokens: int) -> int:
        return max(1, self.gpu_values // max(1, stored.shape[1] * tokens * self.head_dim))

    def whole(self, stored: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        return self._decoded(stored[:, :, :tokens], dtype)

    def _decoded(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(*stored.shape[:-1], self.head_dim, dtype=dtype, device=stored.device)
        self.decode_part(stored, out)
        return out

    def workspace_bytes(self, heads: int, tokens: int) -> int:
        both = 2 * heads * tokens
        at_once = min(both * self.head_dim, max(self.piece_values, heads * self.head_dim))
        return at_once * self.encode_bytes + both * self.width

    def decode_bytes(self, heads: int, tokens: int, dtype: torch.dtype) -> int:
        values = min(heads * tokens * self.head_dim, max(self.gpu_values, tokens * self.head_dim))
        return 2 * values * dtype.itemsize + self.decode_workspace(values)

    def _step(self, heads: int, most: int | None = None) -> int:
        return max(1, (most or self.piece_values) // max(1, heads * self.head_dim))


@dataclass(frozen=True)
class GroupwiseHeads(EncodedHeads):
    """Integers of `bits` bits (4 or 8), with a scale and a minimum for each `group` values.

    `group` divides head_dim, the dimension over which a query is summed. The codes of a group are whole bytes. A head
    stores its scales and minimums (float16), then its codes.
    """

    head_dim: int
    bits: int
    group: int
    encode_bytes = 13  # a copy, float32 values, and codes in float32 and bytes

    @property
    def _codes(self) -> int:
        return self.head_dim // self.group * _WORD  # their offset

    @property
    def width(self) -> int:
        return align(self._codes + self.head_dim * self.bits // 8, _WORD)

    def encode_part(self, x: Tensor, stored: Tensor) -> None:
        packed, view = quantise(x, self.bits, self.group), self._view(stored)
        view.values.copy_(packed.values)
        view.scales.copy_(packed.scales)
        view.minimums.copy_(packed.minimums)

    def decode_part(self, stored: Tensor, out: Tensor) -> None:
        dequantise(self._view(stored), out)

    def decode_workspace(self, values: int) -> int:
        return decode_workspace(values, self.bits, self.group)

    def attend(
        self, q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring
    ) -> Tensor | None:
        layout = HeadLayout(self.bits, self.group, self.nbytes)
        return attend_compiled(q, pages, length, starts, scoring, layout)

    def attend_part(
        self, q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring
    ) -> Partial | None:
        layout = HeadLayout(self.bits, self.group, self.nbytes)
        return part_compiled(q, pages, length, starts, scoring, layout)

    def _view(self, stored: Tensor) -> Packed:
        pairs = stored[..., : self._codes].view(torch.float16).unflatten(-1, (-1, 2))
        codes = self._codes + self.head_dim * self.bits // 8
        return Packed(stored[..., self._codes : codes], pairs[..., 0], pairs[..., 1], self.bits, self.group)
