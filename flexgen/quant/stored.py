"""The codec `stored`: matrices in the encoding in which a quantized checkpoint stores them, byte by byte.

It only decodes: nothing is encoded, so it is not in the registry of codecs. A product with any number of rows decodes
the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.formats import Encoding
from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.quant.codec import MatrixCodec

_DEVICE_BYTES = 16
"""Bytes of memory that a GPU reads and writes to decode one value, for temporaries in float32."""


@dataclass(frozen=True)
class Stored(MatrixCodec[Sequence[Tensor]]):
    """Matrices in `encoding`. An encoded matrix is its tensors, in the order of `Encoding.parts`."""

    encoding: Encoding

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.encoding.name

    def decode(self, encoded: Sequence[Tensor], out: Tensor) -> None:
        self.encoding.decode(encoded, out)

    def decode_workspace(self, shape: Sequence[int]) -> int:
        return self.encoding.decode_workspace(shape)

    def matrix(
        self,
        encoded: Sequence[Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        decoded: Callable[[], Tensor],
    ) -> QuantizedMatrix:
        return CheckpointMatrix(tuple(encoded), dtype, decoded)

    def expected_decoding(self, plain: float, dtype: torch.dtype, on_host: bool) -> float:
        return plain * dtype.itemsize / (self.encoding.host_bytes if on_host else _DEVICE_BYTES)


@dataclass(frozen=True)
class CheckpointMatrix(QuantizedMatrix):
    """A matrix as the tensors of a checkpoint."""

    parts: tuple[Tensor, ...]
    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def gather(self, ids: Tensor) -> Tensor:
        """See `QuantizedMatrix.gather`. Decodes all rows: tables are never stored in this form."""
        return self.decoded()[ids]
