"""Matrices of groups of rows, for products of all groups in one call.

A mixture of experts multiplies each expert with the rows that chose it. The numbers of rows are on the GPU, so one
product for each expert needs them on the host, which waits for the GPU. `grouped_matrices` chooses a product that
reads them on the GPU:

- torch's grouped product, for plain bfloat16 matrices at equal distances and any number of rows;
- otherwise the Triton kernel, for matrices in any places, plain or encoded, and a few rows of each.

On a CPU, the compiled kernel has the same product, which a tape can record. Without any of them, the host multiplies
each group (`grouped.each_linear`). An encoded matrix with many rows is faster decoded, also one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexgen.kernels import grouped
from flexgen.kernels.loading import NUMBERS, announce, native, triton_grouped
from flexgen.kernels.packed import MatrixForm, StoredMatrix
from flexgen.kernels.quantized import QuantizedMatrix

_TRITON_ROWS = 64
"""The rows per group up to which the Triton kernel is used: those of one of its programs. With more, it would decode
a matrix several times."""
_ALIGNMENT = 16
"""Bytes. The Triton kernel reads values in vectors of this size."""


class GroupedMatrices(Protocol):
    """Matrices (out, in) of groups, in an order. They must stay at their addresses."""

    def serves(self, rows: int) -> bool:
        """Whether `multiply` is the fastest product of that number of rows in total."""

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (rows, in) @ the matrix of each row's group, transposed, plus its bias. Does not wait for the device.

        The rows of a group follow one another, in the order of the groups. ends: (groups,) int32 on the device, the
        end of each group's rows.
        """


@dataclass(frozen=True)
class _Stack:
    """Matrices that torch's grouped product multiplies."""

    stack: Tensor

    def serves(self, rows: int) -> bool:
        return True

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped.grouped_linear(x, self.stack, ends)


@dataclass(frozen=True)
class _Scattered:
    """Matrices that the Triton kernel multiplies. addresses: see `triton_grouped.multiply`."""

    form: MatrixForm
    addresses: Tensor

    def serves(self, rows: int) -> bool:
        return rows <= _TRITON_ROWS * self.addresses.shape[1]

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        kernels = triton_grouped(x.device)
        assert kernels is not None
        return kernels.multiply(x.contiguous(), ends, self.addresses, self.form)


@dataclass(frozen=True)
class _OnHost:
    """Matrices that the compiled kernel of the CPU multiplies. addresses: as `_Scattered`. first: one of them."""

    form: grouped.Form
    addresses: Tensor
    first: Tensor | QuantizedMatrix
    dtype: torch.dtype

    def serves(self, rows: int) -> bool:
        return rows <= grouped.most_rows(self.dtype, self.first)

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        x, (out_size, in_size) = x.contiguous(), self.form.shape
        y = x.new_empty(len(x), out_size)
        native.grouped_linear(
            NUMBERS[x.dtype],
            self.form.scale_type,
            self.form.bits,
            (out_size, in_size, self.form.group),
            self.addresses.shape[1],
            x.data_ptr(),
            y.data_ptr(),
            ends.data_ptr(),
            self.addresses.data_ptr(),
            self.form.encoding,
            torch.get_num_threads(),
        )
        return y


def grouped_matrices(
    matrices: Sequence[Tensor | QuantizedMatrix], biases: Sequence[Tensor] | None, dtype: torch.dtype
) -> GroupedMatrices | None:
    """The matrices (out, in), with a bias (out) for each, for products in `dtype`; None if the host must multiply
    each of them.

    With matrices in different places, it enqueues the upload of a table with their addresses.
    """
    first = _stored(matrices[0])
    if first is None:  # a form that only the kernel of a CPU knows
        return _on_host(matrices, biases, dtype)
    device = first.values.device
    if biases is None and grouped.available(device, dtype):
        stack = grouped.stacked(matrices)
        if stack is not None and stack.dtype is dtype:
            return _Stack(stack)
    if triton_grouped(device) is None:
        return _on_host(matrices, biases, dtype) if device.type == "cpu" else None
    stored = [each for each in map(_stored, matrices) if each is not None]
    form = _common_form(stored, biases, dtype) if len(stored) == len(matrices) else None
    return None if form is None else _Scattered(form, address_table(stored, biases))


def _on_host(
    matrices: Sequence[Tensor | QuantizedMatrix], biases: Sequence[Tensor] | None, dtype: torch.dtype
) -> _OnHost | None:
    form = grouped.common_form(dtype, matrices) if dtype in NUMBERS and announce() else None
    plain = biases is None or all(bias.dtype is dtype and bias.is_contiguous() for bias in biases)
    if form is None or not plain:
        return None
    parts = zip(*map(grouped.addresses_of, matrices), strict=True)
    own = [0] * len(matrices) if biases is None else [bias.data_ptr() for bias in biases]
    return _OnHost(form, torch.tensor([*parts, own], dtype=torch.int64), matrices[0], dtype)


def _stored(matrix: Tensor | QuantizedMatrix) -> StoredMatrix | None:
    if not isinstance(matrix, Tensor):
        return matrix.stored
    if matrix.layout is not torch.strided:
        return None
    out_size, in_size = matrix.shape
    return StoredMatrix(MatrixForm((out_size, in_size), bits=0), matrix)


def _common_form(
    stored: Sequence[StoredMatrix], biases: Sequence[Tensor] | None, dtype: torch.dtype
) -> MatrixForm | None:
    """The form of all matrices, or None if they differ or the kernel does not know it."""
    form = stored[0].form
    parts = [part for _, *all_parts in stored for part in all_parts if part is not None]
    parts += [] if biases is None else biases
    known = (
        dtype in NUMBERS
        and all(each.form == form for each in stored)
        and all(part.is_contiguous() for part in parts)
        and all(each.values.data_ptr() % _ALIGNMENT == 0 for each in stored)
        and (form.bits > 0 or all(each.values.dtype is dtype for each in stored))
        and (biases is None or all(bias.dtype is dtype for bias in biases))
    )
    return form._replace(biased=biases is not None) if known else None


def address_table(stored: Sequence[StoredMatrix], biases: Sequence[Tensor] | None) -> Tensor:
    """The addresses of values, scales, minimums and biases, (4, groups) int64 on their device; 0 for no part."""
    device = stored[0].values.device
    parts: list[Sequence[Tensor | None]] = [
        [each.values for each in stored],
        [each.scales for each in stored],
        [each.minimums for each in stored],
        biases or [None] * len(stored),
    ]
    addresses = [[0 if part is None else part.data_ptr() for part in row] for row in parts]
    table = torch.tensor(addresses, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
