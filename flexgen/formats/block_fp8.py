"""FP8 with a scale for each block: DeepSeek V3, Qwen3-FP8, MiniMax-M2. Also with scales for rows or the whole matrix.

The scales of a matrix of any shape are those of its blocks; the last ones may be smaller. Releases also round
activations to FP8, because GPUs multiply both in FP8. flexgen does not round activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.errors import ModelError, shown
from flexgen.formats.encoding import E8M0, FLOAT_SCALES, Encoding, Part, Settings, repeated
from flexgen.kernels.e4m3 import E4M3, scaled
from flexgen.kernels.encoded_linear import Code, EncodedForm

WHOLE = 0
"""The size of a block that is as large as the dimension."""


@dataclass(frozen=True)
class BlockFP8(Encoding):
    """e4m3 values, and a scale for each block of `rows` x `columns` values. `scale`: the suffix of the scales."""

    scale: str
    rows: int
    columns: int

    host_bytes = 12

    @property
    def name(self) -> str:
        rows, columns = (size or "all" for size in (self.rows, self.columns))
        return f"fp8 ({rows} x {columns})"

    @property
    def rows_at_once(self) -> int:
        return self.rows or 1

    @property
    def mark(self) -> tuple[str, torch.dtype]:
        return ".weight", E4M3

    @property
    def form(self) -> EncodedForm:
        return EncodedForm(Code.E4M3, self.columns, scale_rows=self.rows)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        if self.rows == self.columns == WHOLE:
            scales: tuple[int, ...] = (1,)
        else:
            blocks = zip(shape, (self.rows, self.columns), strict=True)
            scales = tuple(math.ceil(size / (block or size)) for size, block in blocks)
        return (
            Part(".weight", (E4M3,), shape),
            Part(self.scale, (*FLOAT_SCALES, E8M0), scales),
        )

    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        codes, scales = parts
        codes, factors = codes[begin:end], scales.float().view(-1, scales.shape[-1])
        if self.rows:
            factors = factors[begin // self.rows : math.ceil(end / self.rows)]
            factors = factors.repeat_interleave(self.rows, dim=0)[: end - begin]
        if self.columns:
            factors = repeated(factors, codes.shape[1], self.columns)
        return scaled(codes.view(torch.uint8), factors)


def read(settings: Settings) -> tuple[Encoding, ...]:
    """The encodings of `quant_method: fp8`."""
    settings.one_of("fmt", ("e4m3", "float8_e4m3fn", None))
    block = settings.values.get("weight_block_size")
    if block is None:
        return (BlockFP8(".weight_scale_inv", WHOLE, WHOLE),)
    return (BlockFP8(".weight_scale_inv", *block_size(block, settings.name, "weight_block_size")),)


def block_size(value: object, name: str, key: str) -> tuple[int, int]:
    """The rows and columns of a block, from a list of both. Raises ModelError."""
    match value:
        case [int(rows), int(columns)] | (int(rows), int(columns)) if min(rows, columns) > 0:
            return rows, columns
    raise ModelError(
        f"{name}: {key} = {shown(value)} is not supported; expected two sizes such as [128, 128]"
    )
