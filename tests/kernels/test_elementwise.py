"""Elementwise operations: the compiled kernel against float64 and against torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.elementwise import add_, silu_product, silu_product_in_torch, silu_product_natively
from flexgen.kernels.loading import native, native_available

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []
HALVES = [torch.bfloat16, torch.float16]


def operands(shape, dtype, halves, seed=0, scale=4.0):
    """gate and up. `halves`: as the halves of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    both = (torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * scale).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    return (gate, up) if halves else (gate.contiguous(), up.contiguous())


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(HALVES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 150)),
    halves=st.booleans(),
    scale=st.sampled_from([0.1, 4.0, 60.0]),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_exact(variant, dtype, shape, halves, scale, seed):
    gate, up = operands(shape, dtype, halves, seed, scale)
    wide = gate.double()
    exact = wide * wide.sigmoid() * up.double()
    plain, before = silu_product_in_torch(gate.clone(), up), native.variant()
    native.set_variant(variant)
    try:
        found = silu_product_natively(gate, up)
    finally:
        native.set_variant(before)
    unit = torch.finfo(dtype).eps
    # Two roundings; and below its normal numbers, the gate of float16 is rounded to multiples of 2**-24.
    tiny = 2**-24 * (up.double().abs() + 1) if dtype is torch.float16 else 1e-30
    assert found.shape == gate.shape and found.dtype is dtype and found.is_contiguous()
    assert ((found.double() - exact).abs() <= 1.02 * unit * exact.abs() + tiny).all()
    torch.testing.assert_close(found, plain, rtol=2 * unit, atol=2**-20)


@needs_kernel
def test_results_do_not_depend_on_the_threads(monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(silu_product(*operands((300, 1000), torch.bfloat16, halves=False)))
    assert all(each.equal(found[0]) for each in found)


@needs_kernel
def test_halves_of_a_tensor_are_not_overwritten():
    gate, up = operands((3, 40), torch.bfloat16, halves=True)
    before = gate.clone(), up.clone()
    assert silu_product(gate, up).equal(silu_product(gate.contiguous(), up.contiguous()))
    assert gate.equal(before[0]) and up.equal(before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["transposed", "every second", "empty"])
def test_other_forms_are_computed_in_torch(dtype, form):
    gate, up = operands((6, 8), dtype, halves=False)
    view = {"transposed": lambda x: x.t(), "every second": lambda x: x[:, ::2], "empty": lambda x: x[:0]}[
        form
    ]
    expected = torch.nn.functional.silu(view(gate)) * view(up)
    found = silu_product(view(gate), view(up))
    assert found.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(1, 1, 77), (3, 64), (130, 700)])
def test_a_sum_is_that_of_torch(version, dtype, shape, monkeypatch):
    if version == "torch":
        monkeypatch.setattr("flexgen.kernels.elementwise.announce", lambda: False)
    out, x = (torch.randn(shape).to(dtype) for _ in range(2))
    expected = out + x
    assert add_(out, x) is out and out.equal(expected)


def test_sums_of_other_forms_are_computed_in_torch():
    out, x = torch.randn(6, 8), torch.randn(8, 6)
    expected = out + x.t(), out + x[0, 0]
    assert add_(out.clone(), x.t()).equal(expected[0]) and add_(out, x[0, 0]).equal(expected[1])
