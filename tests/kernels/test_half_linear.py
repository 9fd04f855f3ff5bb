"""Products in half types on the CPU: both ways against float64, and where they are used."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels import half_linear
from flexgen.kernels.half_linear import (
    fastest,
    multiply_in_pieces,
    multiply_natively,
    native_rows,
    pieces_bytes,
    workspace_bytes,
)
from flexgen.kernels.linear import linear
from flexgen.kernels.loading import native, native_available
from flexgen.kernels.operands import SPAN
from flexgen.kernels.quantized import EVERY_ROW

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
HALVES = [torch.bfloat16, torch.float16]
VARIANTS = native.variants() if native_available() else []


def operands(dtype, rows, out_size, in_size, biased, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*s, generator=generator) for s in ((*rows, in_size), (out_size, in_size), (out_size,))
    )
    return x.to(dtype), weight.to(dtype), bias.to(dtype) if biased else None


def assert_exact(found, x, weight, bias):
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    unit = torch.finfo(x.dtype).eps  # one rounding of the result, and sums in float32
    assert found.dtype is x.dtype and found.shape == exact.shape
    scale = (x.double().abs() @ weight.double().abs().T).max()
    assert ((found.double() - exact).abs() <= unit * exact.abs() + 1e-6 * scale).all()


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(HALVES),
    rows=st.one_of(st.integers(1, 40), st.integers(60, 140), st.integers(255, 260)),
    out_size=st.integers(1, 140),
    in_size=st.one_of(
        st.integers(1, 150), st.integers(1000, 1100), st.integers(2030, 2120), st.integers(4090, 4130)
    ),
    biased=st.booleans(),
)
def test_every_shape(variant, dtype, rows, out_size, in_size, biased):
    before = native.variant()
    native.set_variant(variant)
    try:
        x, weight, bias = operands(dtype, (rows,), out_size, in_size, biased)
        assert_exact(multiply_natively(x, weight, bias), x, weight, bias)
    finally:
        native.set_variant(before)


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(HALVES),
    vectors=st.one_of(st.integers(2, 9), st.integers(15, 18)),
    idle=st.integers(0, 2),
    out_size=st.integers(1, 140),
    lines=st.one_of(st.integers(1, 4), st.integers(30, 34), st.integers(62, 70), st.integers(95, 98)),
    threads=st.integers(1, 3),
)
def test_whole_vectors_of_rows_and_whole_lines(variant, dtype, vectors, idle, out_size, lines, threads):
    # Rows of whole cache lines are copied between products, for depths that may differ in size.
    before = native.variant()
    native.set_variant(variant)
    torch.set_num_threads(threads)
    try:
        x, weight, bias = operands(dtype, (16 * vectors - idle,), out_size, 32 * lines, True)
        assert_exact(multiply_natively(x, weight, bias), x, weight, bias)
    finally:
        native.set_variant(before)


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("in_size", [4096, 4097, 5000, 8192])
def test_one_long_row(variant, dtype, in_size):
    # From 4,097 values on, x is not converted to float32 before the product.
    before = native.variant()
    native.set_variant(variant)
    try:
        x, weight, bias = operands(dtype, (1,), 37, in_size, True)
        assert_exact(multiply_natively(x, weight, bias), x, weight, bias)
    finally:
        native.set_variant(before)


@given(
    dtype=st.sampled_from(HALVES),
    rows=st.integers(0, 60),
    out_size=st.integers(1, 70),
    in_size=st.integers(1, 50),
    biased=st.booleans(),
    piece=st.integers(1, 4000),
    at_once=st.integers(1, 30),
)
def test_in_pieces(dtype, rows, out_size, in_size, biased, piece, at_once):
    x, weight, bias = operands(dtype, (rows,), out_size, in_size, biased)
    found = multiply_in_pieces(x, weight, bias, at_once, piece)
    assert found.shape == (rows, out_size)
    if rows:
        assert_exact(found, x, weight, bias)


@pytest.mark.parametrize("rows", [(1,), (3, 2), (5, 70)])
def test_linear_widens_what_the_processor_does_not_multiply(rows, monkeypatch):
    monkeypatch.setattr(half_linear, "has_products", lambda dtype: dtype not in HALVES)
    for dtype in HALVES:
        x, weight, bias = operands(dtype, rows, 33, 64, True)
        assert fastest(x, weight) in (multiply_natively, multiply_in_pieces)
        assert_exact(linear(x, weight, bias), x, weight, bias)
    x, weight, bias = operands(torch.float32, rows, 33, 64, True)
    assert fastest(x, weight) is None


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_depends_on_no_other(variant):
    """Neither a row of x nor a row of the matrix."""
    before = native.variant()
    native.set_variant(variant)
    try:
        for dtype, rows in itertools.product(HALVES, (32, 37, 70)):
            x, weight, _ = operands(dtype, (rows,), 75, 130, False)
            together = multiply_natively(x, weight)
            x[1:], weight[1:] = float("nan"), float("nan")
            alone = multiply_natively(x, weight)
            assert alone[0, 0].equal(together[0, 0])
            assert alone[1:].isnan().all() and alone[0, 1:].isnan().all()
    finally:
        native.set_variant(before)


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "out_size"), [(1, 700), (2, 700), (5, 700), (32, 700), (33, 700), (300, 700), (300, 5)]
)
def test_results_do_not_depend_on_the_threads(variant, dtype, rows, out_size, monkeypatch):
    before = native.variant()
    native.set_variant(variant)
    try:
        x, weight, bias = operands(dtype, (rows,), out_size, 2100, True)
        found = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(multiply_natively(x, weight, bias))
        assert all(each.equal(found[0]) for each in found)
    finally:
        native.set_variant(before)


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_registers_are_counted(variant):
    before = native.variant()
    native.set_variant(variant)
    try:
        one = native.multiply_registers(1000, 1)
        assert one > 0 and native.multiply_registers(3000, 2) == 6 * one
    finally:
        native.set_variant(before)


@needs_kernel
def test_the_kernel_multiplies_few_rows_and_a_library_many(monkeypatch):
    monkeypatch.setattr(half_linear, "has_products", lambda dtype: True)
    monkeypatch.setattr(half_linear, "_rows", lambda dtype: 8)
    weight = torch.empty(33, 64).bfloat16()
    for rows, expected in {
        (1,): multiply_natively,
        (2, 4): multiply_natively,
        (9,): None,
        (0,): None,
    }.items():
        assert fastest(torch.empty(*rows, 64).bfloat16(), weight) is expected
    assert fastest(torch.empty(1, 33).bfloat16(), weight.t()) is None
    assert fastest(torch.empty(1, 64), torch.empty(33, 64)) is None


@needs_kernel
def test_the_rows_of_the_kernel_depend_on_the_instructions(monkeypatch):
    before = native.variant()
    try:
        for variant in VARIANTS:
            native.set_variant(variant)
            for dtype in HALVES:
                monkeypatch.setattr(half_linear, "has_products", lambda dtype: False)
                widened = native_rows(dtype)
                assert (widened < EVERY_ROW) == (variant == "baseline")
                monkeypatch.setattr(half_linear, "has_products", lambda dtype: True)
                native_products = dtype is torch.bfloat16 and variant == "avx512_bf16"
                assert widened > 0 and (native_rows(dtype) > 0) == native_products
            assert native_rows(torch.float32) == 0
        monkeypatch.setattr(half_linear, "_has_tiles", lambda dtype: True)
        assert 0 < native_rows(torch.float16) == native_rows(torch.bfloat16) < widened
    finally:
        native.set_variant(before)
    monkeypatch.setenv("FLEXGEN_NATIVE", "0")
    assert native_rows(torch.bfloat16) == 0


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [2500, 300])
def test_workspace_is_the_memory_in_addition_to_the_result(rows, biased, peak_bytes):
    x, weight, bias = operands(torch.bfloat16, (rows,), 300, 512, biased)
    piece = 128 * 512 * torch.float32.itemsize  # the last is a part
    result = x.new_empty(rows, 300).nbytes
    bound = pieces_bytes(rows, 300, 512, piece_bytes=piece)
    taken = peak_bytes(lambda: multiply_in_pieces(x, weight, bias, piece_bytes=piece)) - result
    assert 0.95 * bound <= taken <= bound


def test_the_workspace_is_that_of_the_way_a_product_is_computed(monkeypatch):
    monkeypatch.setattr(half_linear, "has_products", lambda dtype: dtype not in HALVES)
    monkeypatch.setattr(half_linear, "native_rows", lambda dtype: 64)
    assert workspace_bytes(2500, 300, 512, torch.bfloat16) == pieces_bytes(2500, 300, 512) > 0
    assert workspace_bytes(2500, 300, 512, torch.float32) == 0
    widened = workspace_bytes(6, 300, 512, torch.bfloat16)
    assert 8 * 512 * torch.float32.itemsize < widened < workspace_bytes(8, 300, 1024, torch.bfloat16)


def test_the_kernel_copies_a_limited_number_of_rows_at_once(monkeypatch):
    monkeypatch.setattr(half_linear, "native_rows", lambda dtype: EVERY_ROW)
    limit = workspace_bytes(SPAN, 300, 512, torch.bfloat16)
    assert limit > workspace_bytes(SPAN // 2, 300, 512, torch.bfloat16)
    assert workspace_bytes(2500, 300, 512, torch.bfloat16) == limit
