"""Products with encoded matrices of group-wise integers, and lookups of their rows.

A product of few rows is bound by the reads of the weights. Encoded weights have a quarter (int4) or half (int8) of
the bytes of a 16-bit matrix, and a decoded matrix must also be written and read. A product of many rows is
compute-bound. With dot products of bfloat16 (`DOTS`), or with AVX2 and x in a half type, the compiled kernels decode
in registers, or for many rows of x in a cache (cpp/methods.h). Otherwise, a library's product with the decoded matrix
is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.groupwise import check_packed, dequantise
from flexgen.kernels.loading import HALVES, NUMBERS, announce, native, native_available, triton_kernels
from flexgen.kernels.operands import SPAN
from flexgen.kernels.packed import MatrixForm, Packed, StoredMatrix
from flexgen.kernels.quantized import EVERY_ROW, QuantizedMatrix
from flexgen.kernels.results import empty_result

DOTS = "avx512_bf16"
"""The compiled variant with dot products of bfloat16 and of int8."""
_WIDENS = "avx2"
"""The compiled variant that decodes a matrix once for many rows of x in a half type, and multiplies it in float32
faster than a library multiplies the decoded matrix (cpp/float_outer.h)."""
_INTEGER_PRODUCTS = frozenset({"avx2", DOTS})
"""The compiled variants that multiply x rounded to int8 as integers (cpp/rounded.h, cpp/dots.h)."""
_DOTS_GROUP = 64
"""Groups of the kernels with dot products are multiples of it; x is rounded to int8 in groups of this size."""

_HOST_ROWS = {torch.bfloat16: 16, torch.float16: 64, torch.float32: 16}
_GPU_ROWS = 64


@dataclass(frozen=True)
class GroupwiseMatrix(QuantizedMatrix):
    """A matrix (out, in) of group-wise integers.

    rounded: whether products on a CPU round x to int8 (`multiply_rounded`).
    """

    packed: Packed
    dtype: torch.dtype
    decoded: Callable[[], Tensor]
    rounded: bool = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed.values, self.packed.scales, self.packed.minimums))

    @property
    def stored(self) -> StoredMatrix:
        packed = self.packed
        out_size, in_size = packed.shape
        form = MatrixForm((out_size, in_size), packed.bits, packed.group, packed.scales.dtype)
        return StoredMatrix(form, packed.values, packed.scales, packed.minimums)

    def fused_rows(self, dtype: torch.dtype) -> int:
        return EVERY_ROW if self._rounds else fused_rows(self.packed, dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return (multiply_rounded if self._rounds else multiply)(x, self.packed, bias)

    def multiply_all(
        self, x: Tensor, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        alike = [m for m in matrices if isinstance(m, GroupwiseMatrix) and m._form == self._form]
        if len(alike) < len(matrices) or not self._form or not _fits_kernel(x, self._rounds):
            return super().multiply_all(x, matrices, biases)
        return multiply_all_natively(x, [matrix.packed for matrix in alike], biases, self._rounds)

    @cached_property
    def _form(self) -> tuple[object, ...]:
        """How the compiled kernels read the matrix: matrices with the same form can share a call. () if they cannot
        read it."""
        packed = self.packed
        check_packed(packed)
        parts = packed.values, packed.scales, packed.minimums
        if not all(part.is_contiguous() and part.device.type == "cpu" for part in parts):
            return ()
        if self._rounds and packed.group != _DOTS_GROUP:
            return ()
        return packed.bits, packed.group, packed.shape[1], packed.scales.dtype, self._rounds

    @property
    def _rounds(self) -> bool:
        return self.rounded and self.packed.values.device.type == "cpu"

    def gather(self, ids: Tensor) -> Tensor:
        return gather(self.packed, ids, self.dtype)


def _fits_kernel(x: Tensor, rounded: bool) -> bool:
    """Whether the compiled kernels multiply x, with or without rounding it to int8."""
    if x.device.type != "cpu" or x.dtype not in NUMBERS or not x.numel() or not announce():
        return False
    return not rounded or has_integer_products()


def has_integer_products() -> bool:
    """Whether the compiled kernels in use multiply x rounded to int8 as integers."""
    return native_available() and native.variant() in _INTEGER_PRODUCTS


def fused_rows(packed: Packed, dtype: torch.dtype) -> int:
    """The maximum rows of an x in `dtype` for which the fused product is faster; 0 if there is no kernel.

    The number applies to one product, regardless of how many products could share a decoded matrix. With more rows,
    decoding pays off. With fewer rows, even a product with a matrix that is already decoded takes longer than the
    fused one (`benchmarks/packed_linear.py`).
    """
    device = packed.values.device
    if device.type == "cpu":
        return host_fused_rows(dtype, packed.group)
    return _GPU_ROWS if triton_kernels(device) and dtype in NUMBERS else 0


def host_fused_rows(dtype: torch.dtype, group: int) -> int:
    """`fused_rows` of a matrix on this machine's CPU."""
    if not announce():
        return 0
    dots = dtype is torch.bfloat16 and group % _DOTS_GROUP == 0 and native.variant() == DOTS
    if dots or (dtype in HALVES and native.variant() == _WIDENS):
        return EVERY_ROW
    return _HOST_ROWS.get(dtype, 0)


def expected_fused_rows(on_host: bool, dtype: torch.dtype) -> int:
    """`fused_rows` on a machine that has the kernels; it may be another machine.

    A CPU that computes in bfloat16 has dot products of it.
    """
    if on_host:
        return EVERY_ROW if dtype is torch.bfloat16 else _HOST_ROWS.get(dtype, 0)
    return _GPU_ROWS if dtype in NUMBERS else 0


def workspace_bytes(rows: int, in_size: int, dtype: torch.dtype) -> int:
    """The maximum bytes for x in the layout of the kernel with dot products; 0 if this machine does not use it.

    With AVX2, x in a half type takes as much as for a plain matrix: `half_linear.workspace_bytes` counts it.
    """
    if dtype is not torch.bfloat16 or not native_available() or native.variant() != DOTS:
        return 0
    floats = in_size // _DOTS_GROUP * (_DOTS_GROUP // 2 + 2)  # pairs, sums and scales
    return torch.float32.itemsize * min(rows, SPAN) * floats


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ packed (out, in) transposed + bias (out), in the dtype of x, with sums in float32."""
    check_packed(packed)
    if len(packed.shape) != 2 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., in) for {tuple(packed.shape)}")
    out_size = packed.shape[0]
    if bias is not None and (bias.shape, bias.dtype) != ((out_size,), x.dtype):
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} and type {bias.dtype}: expected {(out_size,)} and {x.dtype}"
        )
    parts = (packed.values, packed.scales, packed.minimums, *(() if bias is None else (bias,)))
    if any(part.device != x.device for part in parts):
        raise ValueError(f"x is on {x.device}, but the matrix or the bias is on another device")
    if not x.numel() or x.dtype not in NUMBERS or not all(part.is_contiguous() for part in parts):
        return multiply_in_torch(x, packed, bias)
    if x.device.type == "cpu" and announce():
        return multiply_natively(x, packed, bias)
    if kernels := triton_kernels(x.device):
        return kernels.multiply(x, packed, bias)
    return multiply_in_torch(x, packed, bias)


def multiply_rounded(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`multiply` on a CPU with x rounded to int8, with a scale for each group of 64 values of a row.

    The products of a group are sums of integers. So a product takes half the instructions of one in bfloat16 if the
    CPU has dot products of int8, and with AVX2 a third (int4) or a half (int8) of one in float32. Other CPUs compute
    the same values in float32, as fast as `multiply` does.
    """
    native_form = x.dtype in NUMBERS and packed.group == _DOTS_GROUP and x.numel() > 0
    if native_form and has_integer_products():
        return multiply_natively(x, packed, bias, rounded=True)
    wide = round_to_int8(x, packed.group)
    return multiply(wide, packed, None if bias is None else bias.float()).to(x.dtype)


def round_to_int8(x: Tensor, group: int) -> Tensor:
    """x in float32 after rounding: in each group of a row, multiples of 1/127 of the largest value."""
    groups = x.float().unflatten(-1, (-1, group))
    scales = groups.abs().amax(dim=-1, keepdim=True) / 127
    return (groups / scales.where(scales != 0, 1)).round_().mul_(scales).flatten(-2)


def multiply_natively(x: Tensor, packed: Packed, bias: Tensor | None = None, rounded: bool = False) -> Tensor:
    """`multiply` with the compiled kernel. It decodes each weight once for several rows of x and does not write it.

    rounded: as `multiply_rounded`; only for variants with integer products and groups of 64.
    """
    return multiply_all_natively(x, [packed], [bias], rounded)[0]


def multiply_all_natively(
    x: Tensor, matrices: Sequence[Packed], biases: Sequence[Tensor | None], rounded: bool = False
) -> list[Tensor]:
    """`multiply_natively` of x with several matrices in one call. They differ only in their values and numbers of
    rows."""
    x, first = x.contiguous(), matrices[0]
    in_size = x.shape[-1]
    ys = [empty_result((*x.shape[:-1], len(packed.values)), x.dtype) for packed in matrices]
    native.packed_linear(
        NUMBERS[x.dtype],
        NUMBERS[first.scales.dtype],
        first.bits,
        (x.numel() // in_size, in_size, first.group),
        x.data_ptr(),
        [
            (
                len(packed.values),
                y.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                packed.values.data_ptr(),
                packed.scales.data_ptr(),
                packed.minimums.data_ptr(),
            )
            for packed, bias, y in zip(matrices, biases, ys, strict=True)
        ],
        rounded,
        None,
        torch.get_num_threads(),
    )
    return ys


def multiply_in_torch(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`multiply` in torch, on every device: decodes the matrix to new memory, then multiplies."""
    return F.linear(x, dequantise(packed, torch.empty(packed.shape, dtype=x.dtype, device=x.device)), bias)


def gather(packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (any shape) of a matrix (rows, n), as (*ids.shape, n) in `dtype`. Decodes only these rows."""
    taken = ids.flatten()
    found = replace(
        packed,
        values=packed.values.index_select(0, taken),
        scales=packed.scales.index_select(0, taken),
        minimums=packed.minimums.index_select(0, taken),
    )
    return dequantise(found, torch.empty(found.shape, dtype=dtype, device=ids.device)).unflatten(0, ids.shape)
