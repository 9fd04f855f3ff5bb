"""Products of groups of rows, each with a matrix of its own, in one launch.

A mixture of experts multiplies each expert with the rows that chose it. On a GPU, the numbers of rows are on the GPU,
and one product for each expert needs them on the host; torch's grouped product reads them on the GPU. On a CPU, a
product with an expert is so short that its call and the wait for the last thread take a large part of it. In one
compiled call for all experts, the threads continue with the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels import half_linear
from flexgen.kernels.encoded_linear import EncodedMatrix
from flexgen.kernels.groupwise_linear import GroupwiseMatrix
from flexgen.kernels.linear import linear
from flexgen.kernels.loading import NUMBERS, announce, native
from flexgen.kernels.operands import SPAN
from flexgen.kernels.quantized import QuantizedMatrix

_LEAST_CAPABILITY = (8, 0)
"""The lowest compute capability of torch's grouped product."""
_ALIGNMENT = 16
"""Bytes. Rows and matrices begin at multiples of it."""


_HALF_BITS = 16
"""The bits of a plain matrix of a half type, for the compiled kernel."""

Span = tuple[int, int]
"""The first and the last row of a group, exclusive."""


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product in `dtype` on the device."""
    return (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


def stacked(matrices: Sequence[Any]) -> Tensor | None:
    """A view (count, out, in) of matrices that are stored at equal distances; None for any others.

    The weights of a layer are stored one after another, so its experts can be stacked if all have the same home.
    """
    first = matrices[0]
    if not all(isinstance(m, Tensor) and m.layout is torch.strided and m.is_contiguous() for m in matrices):
        return None
    if len({(m.shape, m.dtype, m.untyped_storage().data_ptr()) for m in matrices}) > 1:
        return None
    offsets = [m.storage_offset() for m in matrices]
    steps = {after - before for before, after in itertools.pairwise(offsets)} or {first.numel()}
    step, item = steps.pop(), first.itemsize
    aligned = (
        all(n * item % _ALIGNMENT == 0 for n in (step, first.shape[1])) and not first.data_ptr() % _ALIGNMENT
    )
    if steps or step < first.numel() or not aligned:
        return None
    return first.as_strided((len(matrices), *first.shape), (step, first.shape[1], 1))


def grouped_linear(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x (rows, in) @ the matrix (out, in) of each row's group, transposed.

    stack: (groups, out, in). ends: (groups,) int32, the end of each group's rows. Does not wait for the device.
    """
    return F.grouped_mm(x, stack.transpose(1, 2), offs=ends)


def each_linear(
    x: Tensor, spans: Sequence[Span], columns: Sequence[Sequence[Tensor | QuantizedMatrix]], out_size: int
) -> list[Tensor]:
    """For each of `columns`, the products y (rows, out_size) of x (rows, in) with its matrices (out_size, in).

    Rows `spans[n]` are multiplied with matrix n of each column, transposed. All rows belong to a span.
    """
    results = [x.new_empty(len(x), out_size) for _ in columns]
    form = _native_form(x, spans, [matrix for column in columns for matrix in column])
    if form is not None:
        _multiply_natively(x, spans, columns, results, form)
        return results
    for column, y in zip(columns, results, strict=True):
        for (begin, end), matrix in zip(spans, column, strict=True):
            y[begin:end] = linear(x[begin:end], matrix)
    return results


class Form(NamedTuple):
    """How matrices (out, in) are stored, as the compiled kernel needs it."""

    shape: tuple[int, int]
    scale_type: int
    bits: int
    group: int
    encoding: tuple[int, int, int, int, int, int, bool] | None = None


def _native_form(
    x: Tensor, spans: Sequence[Span], matrices: Sequence[Tensor | QuantizedMatrix]
) -> Form | None:
    """The form of the matrices, if the compiled kernel multiplies all of them fastest."""
    if x.device.type != "cpu" or x.dtype not in NUMBERS or not x.is_contiguous() or not announce():
        return None
    most = max(end - begin for begin, end in spans)
    if most > min(most_rows(x.dtype, matrix) for matrix in matrices):
        return None
    return common_form(x.dtype, matrices)


def most_rows(dtype: torch.dtype, matrix: Tensor | QuantizedMatrix) -> int:
    """The maximum rows of an x in `dtype` for which the compiled kernel multiplies a matrix of an expert fastest."""
    rows = half_linear.native_rows(dtype) if isinstance(matrix, Tensor) else matrix.fused_rows(dtype)
    return min(rows, SPAN)  # x is copied for all matrices at once


def common_form(dtype: torch.dtype, matrices: Sequence[Tensor | QuantizedMatrix]) -> Form | None:
    """The form of all matrices on a CPU for an x in `dtype`; None if they differ or the compiled kernel does not know
    it."""
    forms = {_form(dtype, matrix) for matrix in matrices}
    return forms.pop() if len(forms) == 1 else None


def _form(dtype: torch.dtype, matrix: Tensor | QuantizedMatrix) -> Form | None:
    if isinstance(matrix, EncodedMatrix):
        call = matrix.encoded.call
        if call is None:
            return None
        return Form(matrix.encoded.shape, call.scale_type, call.bits, call.group, call.encoding)
    if isinstance(matrix, GroupwiseMatrix):
        packed = matrix.packed
        parts = packed.values, packed.scales, packed.minimums
        if matrix.rounded or not all(part.is_contiguous() and part.device.type == "cpu" for part in parts):
            return None
        out_size, in_size = packed.shape
        return Form((out_size, in_size), NUMBERS[packed.scales.dtype], packed.bits, packed.group)
    half = dtype in (torch.bfloat16, torch.float16)
    if not isinstance(matrix, Tensor) or matrix.is_mkldnn or matrix.dtype is not dtype or not half:
        return None
    if not matrix.is_contiguous() or matrix.device.type != "cpu":
        return None
    out_size, in_size = matrix.shape
    return Form((out_size, in_size), NUMBERS[dtype], _HALF_BITS, in_size)


def _multiply_natively(
    x: Tensor,
    spans: Sequence[Span],
    columns: Sequence[Sequence[Tensor | QuantizedMatrix]],
    results: Sequence[Tensor],
    form: Form,
) -> None:
    out_size, in_size = form.shape
    first_x, step_x, step_y = x.data_ptr(), in_size * x.itemsize, out_size * x.itemsize
    products = []
    for column, y in zip(columns, results, strict=True):
        first_y = y.data_ptr()
        for (begin, end), matrix in zip(spans, column, strict=True):
            addresses = end - begin, first_x + begin * step_x, first_y + begin * step_y
            products.append((*addresses, *addresses_of(matrix)))
    native.packed_linears(
        NUMBERS[x.dtype],
        form.scale_type,
        form.bits,
        (out_size, in_size, form.group),
        products,
        form.encoding,
        torch.get_num_threads(),
    )


def addresses_of(matrix: Tensor | QuantizedMatrix) -> tuple[int, int, int]:
    """The addresses of values, scales and minimums; 0 for none."""
    if isinstance(matrix, EncodedMatrix):
        return matrix.encoded.addresses
    if isinstance(matrix, GroupwiseMatrix):
        packed = matrix.packed
        return packed.values.data_ptr(), packed.scales.data_ptr(), packed.minimums.data_ptr()
    assert isinstance(matrix, Tensor)
    return matrix.data_ptr(), 0, 0
