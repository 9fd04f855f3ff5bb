"""Weights in GGUF files, which are decoded when they are read."""

from __future__ import annotations

from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import CheckpointError
from flexgen.models.gguf_header import GGUFHeader, package
from flexgen.models.headers import StoredTensor
from flexgen.models.plain_files import reading
from flexgen.models.spec import WeightSpec
from flexgen.models.tensor_files import Extent, PlainFiles, finite

DECODED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""The quantized types that are read. llama.cpp mixes some of them in a file: Q4_K_M has Q4_K, Q5_0, Q6_K and Q8_0."""
_PIECE = 1 << 20
"""Values that are decoded at once. The package takes about nine bytes for each."""


class GGUFCheckpoint(PlainFiles):
    """The tensors of one or more GGUF files, by their names in the files.

    Plain tensors (F32, F16, BF16) can be read in place. The package gguf decodes those of a quantized type a few rows
    at a time.
    """

    def __init__(self, path: Path, header: GGUFHeader) -> None:
        """path: the file, or the first one of several."""
        super().__init__(path, header.tensors)

    def dtype_of(self, weight: WeightSpec) -> torch.dtype:
        """The dtype of the weight: float32 for a quantized type. Raises CheckpointError for an unsupported type."""
        _, stored = self._find(weight)
        if stored.dtype is not None:
            return stored.dtype
        if stored.kind not in DECODED:
            raise CheckpointError(
                f"{stored.path}: {weight.key} has the type {stored.kind}, which is not supported; supported: F32, "
                f"F16, BF16, {', '.join(DECODED)}. Download the model as Q8_0 or Q4_K_M, or in safetensors"
            )
        return torch.float32

    def extent(self, weight: WeightSpec) -> Extent | None:
        """The place of the bytes of a plain weight; None for a quantized one. Raises CheckpointError if it is missing
        or of an unsupported type."""
        self.dtype_of(weight)
        return super().extent(weight) if self._find(weight)[1].dtype is not None else None

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`."""
        self.dtype_of(weight)
        source, stored = self._find(weight)
        if stored.dtype is not None:
            return super().read(weight, dtype, rows)
        rows, width = range(weight.shape[0]) if rows is None else rows, weight.shape[-1]
        made = torch.empty((len(rows), *weight.shape[1:]), dtype=weight.dtype_in(dtype))
        first, step = source.skipped // width + rows.start, max(_PIECE // width, 1)
        with reading(stored.path), stored.path.open("rb", buffering=0) as file:
            for begin in range(0, len(rows), step):
                end = min(begin + step, len(rows))
                decoded = self._decoded_rows(file, stored, width, range(first + begin, first + end), weight)
                made[begin:end] = finite(decoded.to(made.dtype), decoded, stored.path, weight)
        return made

    def _decoded_rows(
        self, file: FileIO, stored: StoredTensor, width: int, rows: range, weight: WeightSpec
    ) -> Tensor:
        """Rows of a stored matrix, of `width` values each, in float32."""
        gguf = package()
        kind = gguf.GGMLQuantizationType[stored.kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = width // block * block_bytes
        file.seek(stored.offset + rows.start * row_bytes)
        data = file.read(len(rows) * row_bytes)
        if len(data) < len(rows) * row_bytes:
            raise CheckpointError(
                f"{stored.path}: the file ends within {weight.key}: it has changed since it was opened. Open the "
                "model again"
            )
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(len(rows), row_bytes)
        return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(blocks, kind), dtype=np.float32))
