"""Integers of 4 or 8 bits in words of 32: GPTQ, AWQ, and `pack-quantized` of compressed-tensors.

A value is (integer - zero point) * scale, with a scale and perhaps a zero point for each group of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.errors import ModelError
from flexgen.formats.encoding import FLOAT_SCALES, Encoding, Part, Settings, check_groups, repeated
from flexgen.kernels.encoded_linear import Code, EncodedForm, Order

_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of AWQ of each of eight columns."""


def _code(bits: int) -> Code:
    return Code.INT4 if bits == 4 else Code.INT8


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers in words (..., n), int32, the first in the lowest bits: uint8 (..., n * 32 / bits)."""
    # Flat, because a dimension of one value may have any stride, which forbids views of other sizes.
    octets = words.contiguous().flatten().view(torch.uint8).view(*words.shape[:-1], -1)
    if bits == 8:
        return octets
    return torch.stack([octets & 0x0F, octets >> 4], dim=-1).flatten(-2)


def _dequantised(codes: Tensor, zeros: Tensor | int, scales: Tensor, group: int) -> Tensor:
    """(codes - zeros) * scales in float32. codes: (rows, n). zeros and scales: (rows, groups)."""
    width = codes.shape[1]
    if isinstance(zeros, Tensor):
        zeros = repeated(zeros.float(), width, group)
    return codes.float().sub_(zeros).mul_(repeated(scales.float(), width, group))


@dataclass(frozen=True)
class PackedRows(Encoding):
    """`pack-quantized` of compressed-tensors: rows of words, and scales (out, groups). group 0: one group per row."""

    bits: int
    group: int
    symmetric: bool

    host_bytes = 15

    @property
    def name(self) -> str:
        return f"int{self.bits} pack-quantized"

    @property
    def rows_at_once(self) -> int:
        return _WORD // self.bits  # zero points are packed along the rows

    @property
    def mark(self) -> tuple[str, torch.dtype]:
        return ".weight_packed", torch.int32

    @property
    def form(self) -> EncodedForm:
        return EncodedForm(_code(self.bits), self.group)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        group = self.group or columns
        check_groups(columns, group)
        each = _WORD // self.bits
        parts = (
            Part(".weight_packed", (torch.int32,), (rows, math.ceil(columns / each))),
            Part(".weight_scale", FLOAT_SCALES, (rows, columns // group)),
        )
        if self.symmetric:
            return parts
        zeros = (math.ceil(rows / each), columns // group)
        return (*parts, Part(".weight_zero_point", (torch.int32,), zeros))

    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        words, scales, *others = parts
        group = self.group or words.shape[1] * (_WORD // self.bits)
        zeros: Tensor | int = 1 << (self.bits - 1)
        if others:
            each = _WORD // self.bits
            packed = others[0][begin // each : math.ceil(end / each)]
            zeros = unpacked(packed.T, self.bits).T[: end - begin]
        width = scales.shape[1] * group
        codes = unpacked(words[begin:end], self.bits)[:, :width]
        return _dequantised(codes, zeros, scales[begin:end], group)


@dataclass(frozen=True)
class GPTQ(Encoding):
    """Columns of words (in / 8, out), and scales (groups, out). `added` to each zero point: 1, or 0 in version 2."""

    bits: int
    group: int
    added: int

    host_bytes = 33

    @property
    def name(self) -> str:
        return f"int{self.bits} gptq"

    @property
    def mark(self) -> tuple[str, torch.dtype]:
        return ".qweight", torch.int32

    @property
    def form(self) -> EncodedForm:
        return EncodedForm(_code(self.bits), self.group, Order.DOWN, added=self.added)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        group, each = self.group or columns, _WORD // self.bits
        check_groups(columns, group)
        if columns % each or rows % each:
            raise ValueError(f"its sizes {rows} and {columns} are not multiples of {each}")
        groups = columns // group
        return (
            Part(".qweight", (torch.int32,), (columns // each, rows)),
            Part(".scales", FLOAT_SCALES, (groups, rows)),
            Part(".qzeros", (torch.int32,), (groups, rows // each)),
        )

    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        words, scales, zeros = parts
        codes = unpacked(words[:, begin:end].T, self.bits)
        zeros = unpacked(zeros, self.bits)[:, begin:end].T + self.added
        return _dequantised(codes, zeros, scales[:, begin:end].T, self.group or codes.shape[1])


@dataclass(frozen=True)
class AWQ(Encoding):
    """Rows of words (in, out / 8), each with eight columns in the order of AWQ, and scales (groups, out)."""

    group: int

    host_bytes = 28

    @property
    def name(self) -> str:
        return "int4 awq"

    @property
    def rows_at_once(self) -> int:
        return len(_AWQ_ORDER)

    @property
    def mark(self) -> tuple[str, torch.dtype]:
        return ".qweight", torch.int32

    @property
    def form(self) -> EncodedForm:
        return EncodedForm(Code.INT4, self.group, Order.ACROSS)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        group, each = self.group or columns, len(_AWQ_ORDER)
        check_groups(columns, group)
        if rows % each:
            raise ValueError(f"its number of rows, {rows}, is not a multiple of {each}")
        return (
            Part(".qweight", (torch.int32,), (columns, rows // each)),
            Part(".scales", FLOAT_SCALES, (columns // group, rows)),
            Part(".qzeros", (torch.int32,), (columns // group, rows // each)),
        )

    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        words, scales, zeros = parts
        each = len(_AWQ_ORDER)
        some = slice(begin // each, math.ceil(end / each))
        codes, zeros = (_rows_of(part[:, some].T)[: end - begin] for part in (words, zeros))
        return _dequantised(codes, zeros, scales[:, begin:end].T, self.group or codes.shape[1])


def _rows_of(words: Tensor) -> Tensor:
    """The integers in words of AWQ (rows / 8, n), as (rows, n) in float32."""
    words = words.contiguous()
    rows = torch.empty(len(words), len(_AWQ_ORDER), words.shape[1], device=words.device)
    for number, place in enumerate(_AWQ_ORDER):
        rows[:, number].copy_((words >> 4 * place).bitwise_and_(0x0F))
    return rows.flatten(0, 1)


def read_gptq(settings: Settings) -> tuple[Encoding, ...]:
    """The encodings of `quant_method: gptq`."""
    if settings.values.get("desc_act"):
        raise ModelError(
            f"{settings.name}: desc_act = True is not supported: it stores the columns of a matrix in another order. "
            "Use a checkpoint that was quantized with desc_act=False, which most are, or the original model"
        )
    bits = settings.one_of("bits", (4, 8))
    version = settings.one_of("checkpoint_format", ("gptq", "gptq_v2", None))
    return (GPTQ(bits, _group(settings), added=0 if version == "gptq_v2" else 1),)


def read_awq(settings: Settings) -> tuple[Encoding, ...]:
    """The encodings of `quant_method: awq`."""
    settings.one_of("bits", (4,))
    # Files of version gemm have zero points in both cases: without them, gptqmodel writes 8 for all.
    settings.one_of("zero_point", (True, False))
    settings.one_of("version", ("gemm", "GEMM", None))
    return (AWQ(_group(settings)),)


def _group(settings: Settings) -> int:
    """The group size; 0 for one group per row."""
    return 0 if settings.values.get("group_size") == -1 else settings.size("group_size")
