"""Floats of 8 bits (e4m3: sign, 4 bits of exponent, 3 of mantissa) with one float32 scale for each row.

A row is an output channel of a matrix, or one head's key or value of one token. Its scale maps its largest value to
448, the largest e4m3. Each value has its own exponent, so a value keeps its relative precision next to one that is a
hundred times larger, and no groups are needed. The scale of a row does not depend on other rows, so a matrix can be
encoded and looked up by rows, and a new token does not change the cached tokens.

A value takes 8 bits, and a row 32 more. The error of a value is at most 2 ** -4 of it, or 2 ** -10 of the scale for
values below 2 ** -6 of the scale, which is 35 millionths of the largest value of the row.

All arithmetic is torch's, except for the experts of a mixture on a GPU. Other products of any size decode the whole
matrix, and attention decodes each page of the cache for each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.kernels.e4m3 import E4M3, scaled
from flexgen.kernels.heads import EncodedHeads, HeadFormat
from flexgen.kernels.packed import MatrixForm, StoredMatrix
from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.quant.codec import ALIGNMENT, Codec
from flexgen.units import align

_SCALE = torch.float32
_LARGEST = torch.finfo(E4M3).max

_LEAST_SCALE = torch.finfo(_SCALE).tiny
_MOST_SCALE = 7.59e35
"""The largest scale whose product with 448 is finite in float32, less a thousandth."""

PIECE = 1 << 19
"""Values decoded at once on a CPU. The temporaries take 6 bytes a value (3 MiB); memory plans do not count them."""

_HOST_BYTES = 14
"""Bytes that a core reads from memory in the time it takes to decode one value: 13 to 16, measured on an EPYC."""


def encode(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Encode the rows of x (..., n), which is finite, to `codes` (..., n), uint8, and `scales` (...), float32."""
    least, most = x.aminmax(dim=-1)
    scales.copy_(torch.maximum(most, -least).to(_SCALE).div_(_LARGEST).clamp_(_LEAST_SCALE, _MOST_SCALE))
    codes.copy_((x / scales[..., None]).to(E4M3).view(torch.uint8))


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Decode the rows of `codes` (..., n) and `scales` (...) to `out` (..., n), contiguous, of any float type."""
    if out.numel():
        (decode_by_bits if out.device.type == "cpu" else decode_by_type)(codes, scales, out)


def decode_by_type(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Decode with torch's conversion, without temporaries."""
    out.copy_(codes.view(E4M3)).mul_(scales[..., None])


def decode_by_bits(codes: Tensor, scales: Tensor, out: Tensor, piece: int = PIECE) -> None:
    """Decode `piece` values at once to the same values on a CPU, where torch's conversion takes ten times as long."""
    rows = (codes.flatten(0, -2), scales.flatten(), out.flatten(0, -2))
    step = max(piece // out.shape[-1], 1)
    for some, scale, target in zip(*(part.split(step) for part in rows), strict=True):
        target.copy_(scaled(some, scale[:, None]))


def _expected_decoding(plain: float, dtype: torch.dtype, on_host: bool) -> float:
    """Bytes/s of decoded values on a device that reads `plain` bytes/s of memory."""
    if on_host:
        return plain * dtype.itemsize / _HOST_BYTES
    # Codes are read and values are written, then the values are read and written again to multiply by the scale.
    return plain * dtype.itemsize / (1 + 3 * dtype.itemsize)


@dataclass(frozen=True)
class FP8(Codec):
    """Stores all codes of a tensor, then its scales."""

    name: str

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1

    def nbytes(self, shape: Sequence[int]) -> int:
        return self._scales(shape) + align(math.prod(shape[:-1]) * _SCALE.itemsize, ALIGNMENT)

    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return (0, shape[-1]), (self._scales(shape), _SCALE.itemsize)

    def encode(self, x: Tensor) -> Tensor:
        encoded = torch.zeros(self.nbytes(x.shape), dtype=torch.uint8, device=x.device)
        encode(x, *self._parts(encoded, x.shape))
        return encoded

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        decode(*self._parts(encoded, out.shape), out)

    def decode_workspace(self, shape: Sequence[int]) -> int:
        return 0

    def matrix(
        self, encoded: Tensor, shape: Sequence[int], dtype: torch.dtype, decoded: Callable[[], Tensor]
    ) -> QuantizedMatrix:
        return FP8Matrix(*self._parts(encoded, shape), dtype, decoded)

    def heads(self, head_dim: int) -> HeadFormat:
        return FP8Heads(head_dim)

    def expected_decoding(self, plain: float, dtype: torch.dtype, on_host: bool) -> float | None:
        return _expected_decoding(plain, dtype, on_host)

    def _scales(self, shape: Sequence[int]) -> int:
        """The offset of the scales, in bytes."""
        return align(math.prod(shape), ALIGNMENT)

    def _parts(self, encoded: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes (*shape) and scales (shape without the last dimension)."""
        begin = self._scales(shape)
        scales = encoded[begin : begin + math.prod(shape[:-1]) * _SCALE.itemsize].view(_SCALE)
        return encoded[: math.prod(shape)].view(*shape), scales.view(*shape[:-1])


@dataclass(frozen=True)
class FP8Matrix(QuantizedMatrix):
    """Codes (out, in), uint8, and scales (out,)."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def stored(self) -> StoredMatrix:
        out_size, in_size = self.codes.shape
        form = MatrixForm((out_size, in_size), bits=8, scale_type=_SCALE, e4m3=True)
        return StoredMatrix(form, self.codes, self.scales)

    def gather(self, ids: Tensor) -> Tensor:
        taken = ids.flatten()
        codes, scales = (part.index_select(0, taken) for part in (self.codes, self.scales))
        out = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
        decode(codes, scales, out)
        return out.unflatten(0, ids.shape)


@dataclass(frozen=True)
class FP8Heads(EncodedHeads):
    """Stores the scale of a head, then its codes."""

    head_dim: int
    encode_bytes = 9  # a copy, quotients in float32, and codes

    @property
    def width(self) -> int:
        return align(_SCALE.itemsize + self.head_dim, _SCALE.itemsize)

    def encode_part(self, x: Tensor, stored: Tensor) -> None:
        encode(x, *self._parts(stored))

    def decode_part(self, stored: Tensor, out: Tensor) -> None:
        decode(*self._parts(stored), out)

    def decode_workspace(self, values: int) -> int:
        return 0

    def expected_attention(self, plain: float, dtype: torch.dtype, on_host: bool) -> float | None:
        # A head is decoded first; then attention reads the decoded values.
        decoded_bytes = self.head_dim * dtype.itemsize
        seconds = decoded_bytes / _expected_decoding(plain, dtype, on_host) + decoded_bytes / plain
        return self.nbytes / seconds

    def _parts(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        scale = _SCALE.itemsize
        codes = stored[..., scale : scale + self.head_dim]
        return codes, stored[..., :scale].view(_SCALE).squeeze(-1)


CODEC = FP8("fp8")
