"""The Triton kernel for groups of matrices on the simulated GPU, which does not load Triton's kernels.

It is an operation of torch, so that its launch is counted and captured, its numbers are computed, and the sanitizer
sees what it reads. On the CPU it decodes each matrix and multiplies it with its rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, library

from flexgen.kernels import grouped_matrices
from flexgen.kernels.groupwise import dequantise_in_torch
from flexgen.kernels.packed import MatrixForm, Packed, StoredMatrix
from flexgen.quant.codecs import fp8

_operations = library.Library("flexgen_simulated", "DEF")
_operations.define(
    "multiply_groups(Tensor x, Tensor ends, Tensor addresses, Tensor[] values, Tensor[] scales, Tensor[] minimums, "
    "Tensor[] biases, int[] shape, int bits, int group, bool e4m3) -> Tensor"
)


def _launch(x: Tensor, *others: object) -> Tensor:
    shape = others[-4]
    return torch.empty(len(x), shape[0], dtype=x.dtype, device=x.device).zero_()  # one kernel


def _compute(
    x: Tensor,
    ends: Tensor,
    addresses: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    minimums: Sequence[Tensor],
    biases: Sequence[Tensor],
    shape: Sequence[int],
    bits: int,
    group: int,
    e4m3: bool,
) -> Tensor:
    for row, parts in zip(addresses.tolist(), (values, scales, minimums, biases), strict=True):
        assert row == ([part.data_ptr() for part in parts] or [0] * len(values))
    y, begin = x.new_empty(len(x), shape[0]), 0
    for n, end in enumerate(ends.tolist()):
        if begin == end:
            continue
        matrix = values[n]
        if bits:
            matrix = torch.empty(*shape, dtype=x.dtype)
            if e4m3:
                fp8.decode(values[n], scales[n], matrix)
            else:
                dequantise_in_torch(Packed(values[n], scales[n], minimums[n], bits, group), matrix)
        y[begin:end] = torch.nn.functional.linear(x[begin:end], matrix, biases[n] if biases else None)
        begin = end
    assert begin == len(x)
    return y


_operations.impl("multiply_groups", _launch, "CUDA")
_operations.impl("multiply_groups", _compute, "CPU")


class _Kernels:
    """What stands for `triton_grouped`. It remembers the matrices of each table."""

    def __init__(self) -> None:
        self.tables: dict[int, tuple[Tensor, list[list[Tensor]]]] = {}
        self.calls = 0

    def remember(
        self, table: Tensor, stored: Sequence[StoredMatrix], biases: Sequence[Tensor] | None
    ) -> None:
        parts = [
            [part for part in column if part is not None] for column in list(zip(*stored, strict=True))[1:]
        ]
        self.tables[table.data_ptr()] = table, [*parts, list(biases or ())]

    def multiply(self, x: Tensor, ends: Tensor, addresses: Tensor, form: MatrixForm) -> Tensor:
        self.calls += 1
        parts = self.tables[addresses.data_ptr()][1]
        return torch.ops.flexgen_simulated.multiply_groups(
            x, ends, addresses, *parts, form.shape, form.bits, form.group, form.e4m3
        )


@contextlib.contextmanager
def simulated_kernels() -> Iterator[_Kernels]:
    """The kernels, which the engine uses meanwhile. `calls`: of their product."""
    kernels, make = _Kernels(), grouped_matrices.address_table

    def address_table(stored: Sequence[StoredMatrix], biases: Sequence[Tensor] | None) -> Tensor:
        table = make(stored, biases)
        kernels.remember(table, stored, biases)
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_matrices, "address_table", address_table)
        patch.setattr(grouped_matrices, "triton_grouped", lambda device: kernels)
        yield kernels


@pytest.fixture
def grouped_kernels() -> Iterator[_Kernels]:
    with simulated_kernels() as kernels:
        yield kernels
