"""RMS norms: the compiled kernel against float64 and against torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.loading import native, native_available
from flexgen.kernels.norms import rms_norm, rms_norm_in_torch, rms_norm_natively

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    size=st.integers(1, 150),
    weighted=st.booleans(),
    plus=st.sampled_from([0.0, 1.0]),
    round_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_exact(variant, dtype, shape, size, weighted, plus, round_first, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, size, generator=generator) * 3).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype) if weighted else None
    before = native.variant()
    native.set_variant(variant)
    try:
        found = rms_norm_natively(x, weight, 1e-5, plus, round_first)
    finally:
        native.set_variant(before)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if weight is not None:
        exact = exact * (weight.double() + plus)
    # Of the normed value, of the factor and of the product.
    roundings = 3 if weighted and round_first else 1
    bound = 0.5 * roundings * torch.finfo(dtype).eps * 1.02 if dtype is not torch.float32 else 1e-6
    assert found.shape == x.shape and found.dtype is dtype
    tiny = torch.finfo(dtype).tiny
    assert ((found.double() - exact).abs() <= bound * exact.abs() + 4 * tiny).all()
    plain = rms_norm_in_torch(x, weight, 1e-5, plus, round_first)
    steps = 4 if dtype is torch.float32 else roundings  # sums in another order
    torch.testing.assert_close(found, plain, rtol=torch.finfo(dtype).eps * steps, atol=4 * tiny)


@needs_kernel
def test_rows_are_independent_of_the_threads_and_of_each_other(monkeypatch):
    x, weight = torch.randn(600, 512).bfloat16(), torch.randn(512).bfloat16()
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(rms_norm(x, weight, 1e-6))
    assert all(each.equal(found[0]) for each in found)
    assert rms_norm(x[17:18], weight, 1e-6).equal(found[0][17:18])


def test_other_inputs_are_computed_in_torch():
    """A weight in another dtype, a view, no rows: the same results."""
    x = torch.randn(4, 6, 8).bfloat16()
    weight = torch.randn(16)[::2]
    for values in (x, x.transpose(0, 1), x[:0]):
        found = rms_norm(values, weight.bfloat16(), 1e-6, 1.0, round_first=False)
        expected = rms_norm_in_torch(values, weight.bfloat16(), 1e-6, 1.0, round_first=False)
        torch.testing.assert_close(found, expected)
    mixed = rms_norm(x.float(), weight.double(), 1e-6, round_first=False)
    torch.testing.assert_close(
        mixed, rms_norm_in_torch(x.float(), weight.float(), 1e-6, 0.0, round_first=False)
    )
