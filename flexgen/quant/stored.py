"""The codec `stored`: matrices in the encoding in which a quantized checkpoint stores them, byte by byte.

It only decodes: nothing is encoded, so it is not in the registry of codecs. On a CPU, a compiled kernel multiplies a
few rows with the encoded matrix. Other products decode the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.formats import Encoding
from flexgen.kernels.encoded_linear import EncodedMatrix, EncodedParts
from flexgen.kernels.loading import native_available
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
        out_size, in_size = shape
        parts = EncodedParts(self.encoding.form, tuple(encoded), (out_size, in_size))
        return EncodedMatrix(parts, dtype, decoded)

    def expected_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        return self.encoding.form.fused_rows(dtype) if on_host else 0

    def certain_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        return self.expected_fused_rows(on_host, dtype) if native_available() else 0

    def expected_decoding(self, plain: float, dtype: torch.dtype, on_host: bool) -> float:
        form = self.encoding.form
        on_core = form.decode_bytes if form.served else self.encoding.host_bytes
        return plain * dtype.itemsize / (on_core if on_host else _DEVICE_BYTES)

    def expected_product(self, rows: float, on_host: bool) -> float | None:
        form = self.encoding.form
        return form.product_bytes(rows) if on_host and form.served else None
