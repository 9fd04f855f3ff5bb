"""Products with matrices in the formats of quantized checkpoints: exact to float32, without decoding the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from quantized_checkpoints import FORMATS
from torch import Tensor

from flexgen.formats import Encoding, read_encodings
from flexgen.kernels.encoded_linear import (
    Code,
    EncodedForm,
    EncodedMatrix,
    EncodedParts,
    Order,
)
from flexgen.kernels.grouped import each_linear
from flexgen.kernels.linear import linear, linears
from flexgen.quant import Stored

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SERVED = [name for name in FORMATS if name not in ("fp8 in blocks", "float-quantized in blocks")]
"""The groups of the others have 24 columns."""


def encoding_of(form: str) -> Encoding:
    (encoding,) = read_encodings(FORMATS[form].config, "mine", "quantization_config")
    return encoding


def refuse() -> Tensor:
    raise AssertionError("the product decodes the matrix")


class Case:
    """A matrix in a format, and its exact values. decoded: what a product uses that decodes it."""

    def __init__(
        self, form: str, shape: tuple[int, int], dtype: torch.dtype, decoded: Callable[[], Tensor] = refuse
    ) -> None:
        generator = torch.Generator().manual_seed(shape[0] + shape[1])
        tensors, _ = FORMATS[form].round(torch.randn(shape, generator=generator) * 0.1)
        self.encoding = encoding_of(form)
        parts = [tensors[p.suffix].reshape(p.shape).contiguous() for p in self.encoding.parts(shape)]
        self.weight = self.encoding.values(parts, 0, shape[0])[:, : shape[1]].double()
        made = Stored(self.encoding).matrix(parts, shape, dtype, decoded)
        assert isinstance(made, EncodedMatrix)
        self.matrix = made

    def check(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        exact = x.double() @ self.weight.T + (0 if bias is None else bias.double())
        assert y.dtype is x.dtype and y.shape == exact.shape
        # Relative to the sums, which may cancel. Zero points are within the range of the values.
        size = x.double().abs() @ (self.weight.abs() + self.weight.abs().amax(1, keepdim=True)).T
        bound = 0.51 * torch.finfo(y.dtype).eps * exact.abs() + 1e-6 * size + 1e-7
        error = (y.double() - exact).abs()
        assert (error <= bound).all(), (error / bound).max()


def rows_of_x(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("shape", [(8, 32), (40, 96), (136, 160), (264, 384)], ids=str)
@pytest.mark.parametrize("form", SERVED)
def test_every_format(form: str, shape: tuple[int, int], variant: str) -> None:
    for dtype in DTYPES:
        case = Case(form, shape, dtype)
        bias = rows_of_x(1, shape[0], dtype)[0]
        for rows in (1, 2, 3, 5, 8, 17):
            x = rows_of_x(rows, shape[1], dtype)
            case.check(case.matrix.multiply(x), x)
            case.check(case.matrix.multiply(x, bias), x, bias)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("int8 pack by rows", (13, 37)),
        ("fp8 in blocks, bfloat16 scales", (130, 131)),
        ("fp8, one scale", (5, 67)),
        ("float-quantized by rows", (7, 9)),
        ("nvfp4 pack", (11, 48)),
        ("gptq in 8 bits by rows", (12, 36)),
        ("int4 pack, zero points", (13, 48)),
    ],
)
def test_rows_that_are_not_whole_vectors(form: str, shape: tuple[int, int], variant: str) -> None:
    case = Case(form, shape, torch.float32)
    for rows in (1, 4):
        x = rows_of_x(rows, shape[1], torch.float32)
        case.check(case.matrix.multiply(x), x)


@pytest.mark.parametrize("form", SERVED)
def test_the_number_of_threads_changes_nothing(form: str, variant: str) -> None:
    case, x = Case(form, (1032, 512), torch.bfloat16), rows_of_x(3, 512, torch.bfloat16)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(linear(x, case.matrix))
    case.check(found[0], x)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("exponent", [0, 1, 100, 150])
def test_scales_that_are_powers_of_two(exponent: int, variant: str) -> None:
    codes = torch.full((2, 16), 0x22, dtype=torch.uint8)  # ones
    scales = torch.full((2, 1), exponent, dtype=torch.uint8)
    parts = EncodedParts(EncodedForm(Code.E2M1, 32), (codes, scales), (2, 32))
    matrix = EncodedMatrix(parts, torch.float32, refuse)
    x = torch.zeros(1, 32)
    x[0, 5] = 4.0
    assert linear(x, matrix).tolist() == [[4 * 2.0 ** (exponent - 127)] * 2]


def test_every_code_of_eight_bits(variant: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    finite = codes.view(torch.float8_e4m3fn).float().nan_to_num(0)
    codes = finite.to(torch.float8_e4m3fn)
    form = EncodedForm(Code.E4M3, 0, scale_rows=0)
    parts = EncodedParts(form, (codes, torch.tensor([2.0])), (4, 64))
    matrix = EncodedMatrix(parts, torch.float32, refuse)
    assert torch.equal(matrix.multiply(torch.eye(64)).T, 2 * finite)


@pytest.mark.parametrize("shape", [(8, 32), (40, 96), (136, 160), (264, 384)], ids=str)
@pytest.mark.parametrize("form", SERVED)
def test_decoded_matrices_are_those_of_torch(form: str, shape: tuple[int, int], variant: str) -> None:
    case = Case(form, shape, torch.float32)
    for dtype in DTYPES:
        out = torch.full(shape, torch.nan, dtype=dtype)
        assert case.matrix.encoded.decode(out)
        assert torch.equal(out, case.weight.to(dtype))


@pytest.mark.parametrize("form", ["int4 pack", "fp8, one scale", "gptq", "awq"])
def test_several_matrices_in_one_call(form: str, variant: str) -> None:
    cases = [Case(form, (out, 128), torch.bfloat16) for out in (40, 136)]
    x, biases = rows_of_x(3, 128, torch.bfloat16), [None, rows_of_x(1, 136, torch.bfloat16)[0]]
    ys = linears(x, [case.matrix for case in cases], biases)
    for case, y, bias in zip(cases, ys, biases, strict=True):
        case.check(y, x, bias)


def test_matrices_of_different_formats_are_multiplied_one_by_one(variant: str) -> None:
    cases = [Case(form, (40, 128), torch.bfloat16) for form in ("int4 pack", "gptq", "mxfp4 pack")]
    x = rows_of_x(3, 128, torch.bfloat16)
    for case, y in zip(cases, linears(x, [c.matrix for c in cases], [None] * 3), strict=True):
        case.check(y, x)


@pytest.mark.parametrize("form", SERVED)
def test_experts_in_one_call(form: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a mixture, each with the matrix of its expert."""
    calls: list[Any] = []
    call = EncodedMatrix.multiply
    monkeypatch.setattr(EncodedMatrix, "multiply", lambda *args: calls.append(args) or call(*args))
    spans: Sequence[tuple[int, int]] = [(0, 1), (1, 4), (4, 5), (5, 17)]
    shape = (264, 128)
    columns = [[Case(form, shape, torch.float16) for _ in spans] for _ in range(2)]
    x = rows_of_x(17, shape[1], torch.float16)
    found = each_linear(x, spans, [[case.matrix for case in column] for column in columns], shape[0])
    assert not calls, "each matrix has a call of its own"
    for column, y in zip(columns, found, strict=True):
        for (begin, end), case in zip(spans, column, strict=True):
            case.check(y[begin:end], x[begin:end])


def test_many_rows_use_the_decoded_matrix(variant: str) -> None:
    decoded = torch.randn(40, 64)
    case = Case("int4 pack", (40, 64), torch.float32, lambda: decoded)
    x = rows_of_x(case.matrix.fused_rows(torch.float32) + 1, 64, torch.float32)
    assert torch.equal(linear(x, case.matrix), x @ decoded.T)
    case.check(linear(x[:-1], case.matrix), x[:-1])


@pytest.mark.parametrize("change", ["groups", "stride", "switched off"])
def test_without_the_kernel_the_matrix_is_decoded(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = torch.randn(40, 96)
    form = "fp8 in blocks" if change == "groups" else "int4 pack"
    matrix = Case(form, (40, 96), torch.float32, lambda: decoded).matrix
    if change == "stride":
        parts = tuple(part.T.contiguous().T for part in matrix.encoded.parts)
        matrix = replace(matrix, encoded=replace(matrix.encoded, parts=parts))
    if change == "switched off":
        monkeypatch.setattr("flexgen.kernels.encoded_linear.announce", lambda: False)
    x = rows_of_x(3, 96, torch.float32)
    assert matrix.fused_rows(torch.float32) == 0
    for y in (linear(x, matrix), matrix.multiply(x), *linears(x, [matrix], [None])):
        torch.testing.assert_close(y, x @ decoded.T)


def test_forms_that_the_kernel_knows() -> None:
    assert not EncodedForm(Code.E4M3, 24).served
    assert not EncodedForm(Code.INT4, 1).served
    assert all(EncodedForm(Code.INT4, group).served for group in (0, 8, 16, 32, 96, 128))
    assert not EncodedForm(Code.INT4, 4, Order.DOWN).served, "a word has two groups"
    assert EncodedForm(Code.INT8, 4, Order.DOWN).served
    assert EncodedForm(Code.INT4, 24, Order.ACROSS).served
