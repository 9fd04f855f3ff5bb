"""A minimal codec for tests: values in float32, which is lossless for a model in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.heads import EncodedHeads, HeadFormat
from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.quant.codec import Codec


@dataclass(frozen=True)
class Float32(Codec):
    name: str

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1

    def nbytes(self, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return ((0, 4 * shape[-1]),)

    def encode(self, x: Tensor) -> Tensor:
        return x.float().flatten().view(torch.uint8)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        out.copy_(encoded.view(torch.float32).view(out.shape))

    def decode_workspace(self, shape: Sequence[int]) -> int:
        return 0

    def matrix(
        self, encoded: Tensor, shape: Sequence[int], dtype: torch.dtype, decoded: Callable[[], Tensor]
    ) -> QuantizedMatrix:
        return Float32Matrix(encoded.view(torch.float32).view(*shape), dtype, decoded)

    def heads(self, head_dim: int) -> HeadFormat:
        return Float32Heads(head_dim)

    def expected_decoding(self, plain: float, dtype: torch.dtype, on_host: bool) -> float:
        return plain


@dataclass(frozen=True)
class Float32Matrix(QuantizedMatrix):
    values: Tensor
    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def gather(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.values).to(self.dtype)


@dataclass(frozen=True)
class Float32Heads(EncodedHeads):
    head_dim: int
    encode_bytes = 4

    @property
    def width(self) -> int:
        return 4 * self.head_dim

    def encode_part(self, x: Tensor, stored: Tensor) -> None:
        stored.view(torch.float32).copy_(x)

    def decode_part(self, stored: Tensor, out: Tensor) -> None:
        out.copy_(stored.view(torch.float32))

    def decode_workspace(self, values: int) -> int:
        return 0

    def expected_attention(self, plain: float, dtype: torch.dtype, on_host: bool) -> float:
        return plain / 2


CODEC = Float32("float32_codec")
