"""Products with group-wise integers against float64, and what `linear` and `embedding` make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels import groupwise_linear
from flexgen.kernels.groupwise import dequantise_in_torch, quantise
from flexgen.kernels.groupwise_linear import (
    GroupwiseMatrix,
    fused_rows,
    gather,
    multiply,
    multiply_in_torch,
    multiply_natively,
    multiply_rounded,
    round_to_int8,
)
from flexgen.kernels.linear import embedding, linear
from flexgen.kernels.packed import Packed
from flexgen.kernels.quantized import EVERY_ROW

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [torch.float16, torch.bfloat16]

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    """Random x (rows, in), packed weights (out, in) and a bias, or none."""

    def __init__(
        self, dtype, rows, out, groups, bits=4, group=64, scales=torch.float16, biased=True, offset=0.0
    ):
        generator = torch.Generator().manual_seed(rows * 1000 + out)
        size = groups * group
        self.x = (torch.randn(rows, size, generator=generator) + offset).to(dtype)
        weight = torch.randn(out, size, generator=generator) * 0.05 + offset / 10
        self.packed = quantise(weight, bits, group, scales)
        self.bias = torch.randn(out, generator=generator).to(dtype) if biased else None
        self.arguments = self.x, self.packed, self.bias

    @property
    def weight(self):
        return dequantise_in_torch(self.packed, torch.empty(self.packed.shape, dtype=torch.float64))

    def check(self, y, version):
        x, weight = self.x.double(), self.weight
        exact = x @ weight.T + (0 if self.bias is None else self.bias.double())
        assert y.dtype is self.x.dtype and y.shape == exact.shape
        # Relative to the sums, which may cancel; in torch the weights are rounded as well.
        size = x.abs() @ weight.abs().T
        unit, rounded = torch.finfo(y.dtype).eps, version == "torch" and y.dtype is not torch.float32
        bound = 0.51 * unit * exact.abs() + size * (unit if rounded else 4e-6) + 1e-6
        error = (y.double() - exact).abs()
        assert (error <= bound).all(), (error / bound).max()

    def check_rounded(self, y):
        """Compare y with the product of the rounded x."""
        x, weight = round_to_int8(self.x, self.packed.group).double(), self.weight
        exact = x @ weight.T + (0 if self.bias is None else self.bias.double())
        assert y.dtype is self.x.dtype and y.shape == exact.shape
        bound = 0.51 * torch.finfo(y.dtype).eps * exact.abs() + x.abs() @ weight.abs().T * 4e-6 + 1e-6
        error = (y.double() - exact).abs()
        assert (error <= bound).all(), (error / bound).max()


def product(version):
    return multiply_in_torch if version == "torch" else multiply_natively


PRODUCTS = [multiply_natively, multiply_rounded]


@relaxed
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.one_of(st.integers(1, 33), st.integers(60, 70), st.integers(255, 258)),
    out=st.integers(1, 140),
    groups=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96, 128, 192]),
    scales=st.sampled_from(SCALES),
    biased=st.booleans(),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_every_shape(version, dtype, rows, out, groups, bits, group, scales, biased, offset):
    case = Case(dtype, rows, out, groups, bits, group, scales, biased, offset)
    case.check(product(version)(*case.arguments), version)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(version, dtype, bits):
    # Blocks of x have up to 16 rows, and from 65 rows another kernel multiplies (cpp/methods.h).
    for rows in [*range(1, 18), 28, 29, 32, 33, 43, 64, 65]:
        case = Case(dtype, rows, 37, 33, bits)
        case.check(product(version)(*case.arguments), version)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [64, 127, 300, 600])
def test_one_row_of_many_groups(version, groups, bits):
    # 127 groups are whole lines of codes for eight bits only, and no whole vectors of scales (cpp/lines.h).
    case = Case(torch.bfloat16, 1, 37, groups, bits)
    case.check(product(version)(*case.arguments), version)


@pytest.mark.parametrize("multiplied", PRODUCTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 14, 31, 64, 300])
def test_large_matrices_are_split_over_threads(variant, bits, rows, multiplied):
    case = Case(torch.bfloat16, rows, 1501, 16, bits)
    torch.set_num_threads(1)
    alone = multiplied(*case.arguments)
    if multiplied is multiply_rounded:
        case.check_rounded(alone)
    else:
        case.check(alone, variant)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(multiplied(*case.arguments), alone)


@relaxed
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.one_of(st.integers(1, 40), st.integers(60, 70), st.integers(255, 258)),
    out=st.integers(1, 70),
    groups=st.integers(1, 19),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128]),
    scales=st.sampled_from(SCALES),
    biased=st.booleans(),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_rounded_products_are_those_of_the_rounded_x(
    version, dtype, rows, out, groups, bits, group, scales, biased, offset
):
    with pytest.MonkeyPatch.context() as patch:
        if version == "torch":
            patch.setattr(groupwise_linear, "announce", lambda: False)
            patch.setattr(groupwise_linear, "native_available", lambda: False)
        case = Case(dtype, rows, out, groups, bits, group, scales, biased, offset)
        found = multiply_rounded(*case.arguments)
    rounded = round_to_int8(case.x, group)
    largest = case.x.float().unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True)
    error = (rounded - case.x.float()).unflatten(-1, (-1, group)).abs()
    assert (error <= largest * 0.501 / 127).all()
    case.check_rounded(found)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [*range(1, 10), 40])
@pytest.mark.parametrize("scales", SCALES)
def test_rounded_products_of_the_largest_integers_are_exact(variant, bits, rows, scales):
    """Sums of pairs, of eight pairs and of groups are largest if all codes and all values of x are."""
    largest, groups, out = 2**bits - 1, 3, 19
    generator = torch.Generator().manual_seed(rows)
    signs = torch.randint(0, 2, (rows, groups * 64), generator=generator) * 2 - 1
    signs[0], signs[-1] = 1, -1
    codes = torch.randint(0, 2, (out, groups * 64), generator=generator) * largest
    codes[0], codes[-1] = largest, 0
    octets = codes if bits == 8 else codes[:, ::2] + codes[:, 1::2] * 16
    ones = torch.ones(out, groups, dtype=scales)
    for minimum in (0.0, -largest):
        packed = Packed(octets.to(torch.uint8), ones, ones * minimum, bits, 64)
        weight = dequantise_in_torch(packed, torch.empty(packed.shape, dtype=torch.float64))
        x = 127.0 * signs
        assert torch.equal(multiply_rounded(x, packed).double(), x.double() @ weight.T)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_rounded_products_do_not_hide_what_is_not_finite(version, bits, rows, monkeypatch):
    if version == "torch":
        monkeypatch.setattr(groupwise_linear, "announce", lambda: False)
        monkeypatch.setattr(groupwise_linear, "native_available", lambda: False)
    case = Case(torch.bfloat16, rows, 20, 3, bits)
    case.x[0, 70] = float("inf")
    case.x[-1, 3] = float("nan")
    found = multiply_rounded(*case.arguments)
    assert not found[0].isfinite().any() and not found[-1].isfinite().any()
    assert found[1:-1].isfinite().all()


def test_a_matrix_that_rounds_never_decodes(variant):
    for rows in (1, 40):
        case = Case(torch.float32, rows, 9, 2)
        matrix = GroupwiseMatrix(case.packed, torch.float32, lambda: pytest.fail("decoded"), rounded=True)
        expected = round_to_int8(case.x, 64).double() @ case.weight.T + case.bias.double()
        assert torch.allclose(linear(case.x, matrix, case.bias).double(), expected, atol=1e-4)


def test_each_code_meets_its_value(variant):
    """One x that is not zero at a time takes single weights out of the matrix, without rounding."""
    packed = Packed(
        torch.arange(256, dtype=torch.uint8).view(1, 256),
        torch.ones(1, 4).half(),
        torch.zeros(1, 4).half(),
        8,
        64,
    )
    for bits, matrix in ((8, packed), (4, quantise(torch.arange(256.0).remainder(16).view(1, 256), 4))):
        for dtype in DTYPES:
            found = multiply_natively(torch.eye(256, dtype=dtype), matrix)
            expected = torch.arange(256).remainder(2**bits)
            assert torch.equal(found[:, 0].long(), expected), (bits, dtype)


@pytest.mark.parametrize("multiplied", PRODUCTS)
def test_a_row_depends_on_no_other(variant, multiplied):
    for dtype in DTYPES:
        for rows in (13, 37, 70):
            case = Case(dtype, rows, 21, 3)
            together = multiplied(*case.arguments)
            case.x[1:] = float("nan")
            assert torch.equal(multiplied(*case.arguments)[0], together[0])


@pytest.mark.parametrize("multiplied", PRODUCTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 9, 67])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_does_not_depend_on_other_rows_of_the_matrix(variant, bits, groups, rows, multiplied):
    """With one row of x, kernels may multiply two rows of W at once, and the last one alone. With more rows, they may
    complete a block of rows of W with others."""
    case = Case(torch.bfloat16, rows, 19, groups, bits)
    x, packed, bias = case.arguments
    every = multiplied(x, packed, bias)
    for part in (slice(0, 1), slice(1, 2), slice(1, 4), slice(2, 19)):
        parts = {name: getattr(packed, name)[part] for name in ("values", "scales", "minimums")}
        assert multiplied(x, replace(packed, **parts), bias[part]).equal(every[:, part])


def test_the_public_function_takes_what_fits(version, monkeypatch):
    if version == "torch":
        monkeypatch.setattr(groupwise_linear, "announce", lambda: False)
    case = Case(torch.bfloat16, 6, 10, 2)
    expected = multiply(*case.arguments)
    case.check(expected, version)
    assert torch.equal(multiply(case.x.view(2, 3, 128), case.packed, case.bias), expected.view(2, 3, 10))
    strided = torch.stack((case.x, case.x), dim=-1)[..., 0]
    assert torch.equal(multiply(strided, case.packed, case.bias), expected)
    assert multiply(case.x[:0], case.packed).shape == (0, 10)
    double = Case(torch.float64, 2, 3, 1)
    assert multiply(*double.arguments).dtype is torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[:, :64], w, b), r"x has shape \(2, 64\): expected \(..., in\) for \(3, 128\)"),
        (lambda x, w, b: (x, w, b[:2]), r"bias of shape \(2,\).*: expected \(3,\)"),
        (lambda x, w, b: (x, w, b.double()), "expected .* torch.float32"),
        (
            lambda x, w, b: (x, Packed(w.values[:2], w.scales, w.minimums, 4, 64), b),
            "expected uint8 of shape",
        ),
        (lambda x, w, b: (x.to("meta"), w, b), "x is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        multiply(*change(*Case(torch.float32, 2, 3, 2).arguments))


class Decoded:
    """Decodes a matrix when called, and counts."""

    def __init__(self, packed, dtype):
        self.count = 0
        self.matrix = GroupwiseMatrix(packed, dtype, self)

    def __call__(self):
        self.count += 1
        return dequantise_in_torch(self.matrix.packed, torch.empty(self.matrix.packed.shape)).to(
            self.matrix.dtype
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_fused_and_many_decode(variant, dtype):
    most = fused_rows(Case(dtype, 1, 4, 2).packed, dtype)
    every = most == EVERY_ROW
    halves = torch.bfloat16, torch.float16
    expected = {"avx2": halves, groupwise_linear.DOTS: (torch.bfloat16,)}
    assert every == (dtype in expected.get(variant, ()))
    for rows, count in ((1, 0), (most, 0), (most + 1, 1)) if not every else ((1, 0), (300, 0)):
        case = Case(dtype, rows, 9, 2)
        decoded = Decoded(case.packed, dtype)
        case.check(linear(case.x[None], decoded.matrix, case.bias)[0], "torch")
        assert decoded.count == count


def test_without_a_kernel_all_decode(monkeypatch):
    monkeypatch.setattr(groupwise_linear, "announce", lambda: False)
    case = Case(torch.bfloat16, 1, 9, 2)
    decoded = Decoded(case.packed, torch.bfloat16)
    case.check(linear(case.x, decoded.matrix, case.bias), "torch")
    assert decoded.count == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table_are_those_of_the_decoded_table(version, monkeypatch, dtype, bits):
    if version == "torch":
        monkeypatch.setattr("flexgen.kernels.groupwise.announce", lambda: False)
    packed = Case(dtype, 1, 50, 3, bits).packed
    decoded = Decoded(packed, dtype)
    table = decoded()
    for ids in (
        torch.tensor([[4, 49, 0], [4, 4, 7]]),
        torch.tensor([3]),
        torch.empty(2, 0, dtype=torch.int64),
    ):
        expected = torch.nn.functional.embedding(ids, table)
        assert torch.equal(embedding(ids, decoded.matrix), expected)
        assert torch.equal(gather(packed, ids, dtype), expected)
        assert torch.equal(embedding(ids, table), expected)
    assert decoded.count == 1, "only the rows that are asked for are decoded"
