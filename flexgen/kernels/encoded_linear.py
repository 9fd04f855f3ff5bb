"""Products with matrices in the formats of quantized checkpoints, on a CPU.

The compiled kernel reads the tensors of the file where they are, and unpacks each value in registers to the float32
value that decoding gives. Sums are in float32. So a product reads only the bytes of the file, and is more exact than
one with the matrix decoded to a half type. Without the kernel, and for many rows of x, the matrix is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.kernels.e4m3 import E4M3
from flexgen.kernels.loading import NUMBERS, announce, native
from flexgen.kernels.packed import MatrixForm, StoredMatrix
from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.kernels.results import empty_result
from flexgen.units import align

_STEP = 32
"""Groups of rows of codes are multiples or divisors of it: the values that the widest variant unpacks at once."""


class _Times(NamedTuple):
    """Bytes that a core reads from memory in the time in which it unpacks a value, multiplies it with a row of x, and
    decodes it. rows: the maximum rows for which a product is faster than decoding and a library's product."""

    unpack: float
    row: float
    decode: float
    rows: dict[torch.dtype, int]


# As benchmarks/packed_linear.py measured on an EPYC. Products with words are faster, because x is read number by
# number, and decoding is slower, because the matrix is transposed.
_BY_ROWS = _Times(1.0, 0.6, 3, {torch.bfloat16: 8, torch.float16: 16, torch.float32: 16})
_BY_WORDS = _Times(0.9, 0.4, 20, dict.fromkeys(NUMBERS, 64))


class Code(IntEnum):
    """How a value is stored. Integers are unsigned, with a zero point."""

    INT4 = 0
    INT8 = 1
    E2M1 = 2
    E4M3 = 3

    @property
    def bits(self) -> int:
        return 8 if self in (Code.INT8, Code.E4M3) else 4


class Order(IntEnum):
    """How the codes are stored: by rows, the first in the low bits of a byte; or in words of 32 bits."""

    ROWS = 0
    DOWN = 1
    """Words (in / 8, out), each with consecutive values of a row, the first in the low bits (GPTQ)."""
    ACROSS = 2
    """Words (in, out / 8), each with values of eight rows: in the low bits 0, then 2, 4, 6, 1, 3, 5, 7 (AWQ)."""


class _Scale(IntEnum):
    NUMBER = 0
    POWER = 1
    E4M3 = 2


_SMALL_SCALES = {
    torch.uint8: _Scale.POWER,
    torch.float8_e8m0fnu: _Scale.POWER,
    E4M3: _Scale.E4M3,
}


class EncodedForm(NamedTuple):
    """How a format stores matrices (out, in). All values of `group` columns (0: of the whole row) share a scale.

    By rows, scales are (out / scale_rows, groups), where 0 scale_rows are all rows, and zero points are packed along
    the rows. In the other orders, scales are (groups, out), and zero points are packed like the codes; `added` is
    added to them. divides: whether the scale of the whole matrix divides values.
    """

    code: Code
    group: int
    order: Order = Order.ROWS
    scale_rows: int = 1
    added: int = 0
    divides: bool = False

    @property
    def served(self) -> bool:
        """Whether the compiled kernel multiplies such matrices."""
        group = self.group
        if self.order is Order.DOWN:
            return group % (32 // self.code.bits) == 0
        return self.order is Order.ACROSS or group % _STEP == 0 or (group > 1 and _STEP % group == 0)

    @property
    def _times(self) -> _Times:
        return _BY_ROWS if self.order is Order.ROWS else _BY_WORDS

    def fused_rows(self, dtype: torch.dtype) -> int:
        """`QuantizedMatrix.fused_rows` on a CPU with the compiled kernel."""
        return self._times.rows.get(dtype, 0) if self.served else 0

    def product_bytes(self, rows: float) -> float:
        """Bytes that a core reads from memory in the time of a compiled product of `rows` rows with one value."""
        return max(self.code.bits / 8, self._times.unpack + rows * self._times.row)

    @property
    def decode_bytes(self) -> float:
        """Bytes that a core reads from memory in the time in which the compiled kernel decodes a value."""
        return self._times.decode


class _Call(NamedTuple):
    """The arguments of a compiled product that all matrices of a call share."""

    scale_type: int
    bits: int
    in_size: int
    group: int
    encoding: tuple[int, int, int, int, int, int, bool]


@dataclass(frozen=True)
class EncodedParts:
    """The tensors of a matrix of `shape`: the codes, the scales, and perhaps zero points or the scale of the whole
    matrix."""

    form: EncodedForm
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]

    @cached_property
    def call(self) -> _Call | None:
        """How the compiled kernel reads the matrix; None if it cannot."""
        form = self.form
        if not form.served or not announce():
            return None
        if not all(part.device.type == "cpu" and part.is_contiguous() for part in self.parts):
            return None
        codes, scales, *_ = self.parts
        out_size, in_size = self.shape
        small = _SMALL_SCALES.get(scales.dtype)
        encoding = (
            form.order.value,
            form.code.value,
            (small or _Scale.NUMBER).value,
            codes.nbytes // out_size,
            form.scale_rows or out_size,
            form.added,
            form.divides,
        )
        scale_type = NUMBERS[torch.float32 if small else scales.dtype]
        group = form.group or align(in_size, _STEP if form.order is Order.ROWS else 1)
        return _Call(scale_type, form.code.bits, in_size, group, encoding)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """The addresses of the parts; 0 for none."""
        codes, scales, *others = self.parts
        return codes.data_ptr(), scales.data_ptr(), others[0].data_ptr() if others else 0

    def decode(self, out: Tensor) -> bool:
        """Write the matrix to `out` (out, in), rounded to its dtype, with the compiled kernel. False if it cannot."""
        plain = out.device.type == "cpu" and out.dtype in NUMBERS and out.is_contiguous()
        call = self.call if plain else None
        if call is None:
            return False
        native.decode(
            NUMBERS[out.dtype],
            call.scale_type,
            call.bits,
            (*self.shape, call.group),
            out.data_ptr(),
            *self.addresses,
            call.encoding,
            torch.get_num_threads(),
        )
        return True


@dataclass(frozen=True)
class EncodedMatrix(QuantizedMatrix):
    """A matrix as the tensors of a checkpoint."""

    encoded: EncodedParts
    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.encoded.parts)

    def gather(self, ids: Tensor) -> Tensor:
        """See `QuantizedMatrix.gather`. Decodes all rows: tables are never stored in this form."""
        return self.decoded()[ids]

    @property
    def stored(self) -> StoredMatrix | None:
        """FP8 with a scale for each row, which the kernel of a GPU for all experts knows."""
        form, (codes, scales, *_) = self.encoded.form, self.encoded.parts
        if form != EncodedForm(Code.E4M3, group=0) or scales.dtype not in NUMBERS:
            return None
        stored = MatrixForm(self.encoded.shape, form.code.bits, scale_type=scales.dtype, e4m3=True)
        return StoredMatrix(stored, codes.view(torch.uint8), scales)

    def fused_rows(self, dtype: torch.dtype) -> int:
        return self.encoded.form.fused_rows(dtype) if self.encoded.call is not None else 0

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._fits(x):
            return super().multiply(x, bias)
        return _multiply_natively(x, [self.encoded], [bias])[0]

    def multiply_all(
        self, x: Tensor, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        encoded = [matrix.encoded for matrix in matrices if isinstance(matrix, EncodedMatrix)]
        alike = [each for each in encoded if each.call == self.encoded.call]
        if len(alike) < len(matrices) or not self._fits(x):
            return super().multiply_all(x, matrices, biases)
        return _multiply_natively(x, alike, biases)

    def _fits(self, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype in NUMBERS and x.numel() > 0
        return plain and self.encoded.call is not None


def _multiply_natively(
    x: Tensor, matrices: Sequence[EncodedParts], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    x, call = x.contiguous(), matrices[0].call
    assert call is not None
    ys = [empty_result((*x.shape[:-1], matrix.shape[0]), x.dtype) for matrix in matrices]
    native.packed_linear(
        NUMBERS[x.dtype],
        call.scale_type,
        call.bits,
        (x.numel() // call.in_size, call.in_size, call.group),
        x.data_ptr(),
        [
            (matrix.shape[0], y.data_ptr(), 0 if bias is None else bias.data_ptr(), *matrix.addresses)
            for matrix, bias, y in zip(matrices, biases, ys, strict=True)
        ],
        False,
        call.encoding,
        torch.get_num_threads(),
    )
    return ys
