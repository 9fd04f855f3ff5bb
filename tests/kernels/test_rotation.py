"""Rotary positions of single tokens: the compiled kernel against float64 and against torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.loading import native, native_available
from flexgen.kernels.rotation import rotate_in_torch, rotate_natively, rotate_token, token_factors

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []


def operands(rows, heads, kv_heads, head_dim, pairs, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(rows, 1, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    q, k, _ = (each.transpose(1, 2) for each in fused.split([heads, kv_heads, kv_heads], dim=2))
    angles = torch.rand(rows, 1, 1, pairs, generator=generator) * 6
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    pairs=st.integers(1, 70),
    rest=st.integers(0, 20),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_exact(variant, rows, heads, kv_heads, pairs, rest, dtype, seed):
    q, k, cos, sin = operands(rows, heads, kv_heads, 2 * pairs + rest, pairs, dtype, seed)
    factors = token_factors(cos, sin)
    plain, before = rotate_in_torch(q, k, factors), native.variant()
    wide = [x.double() for x in (q, k)]
    native.set_variant(variant)
    try:
        found = rotate_natively(q, k, factors)
    finally:
        native.set_variant(before)
    unit = torch.finfo(dtype).eps
    for each, exact, same in zip(found, wide, plain, strict=True):
        a, b, others = exact[..., :pairs], exact[..., pairs : 2 * pairs], exact[..., 2 * pairs :]
        turned = torch.cat(
            (a * cos.double() - b * sin.double(), b * cos.double() + a * sin.double(), others), -1
        )
        assert ((each.double() - turned).abs() <= unit * (turned.abs() + exact.abs().amax() * 2)).all()
        assert each.equal(same)


@needs_kernel
def test_the_values_next_to_queries_and_keys_do_not_change():
    q, k, cos, sin = operands(3, 4, 2, 16, 6, torch.bfloat16)
    fused = torch.as_strided(q, (3, 8, 16), (8 * 16, 16, 1), 0)
    before = fused.clone()
    rotate_token(q, k, token_factors(cos, sin))
    assert fused[:, 6:].equal(before[:, 6:]) and fused[..., 12:].equal(before[..., 12:])
    assert not fused[:, :6, :12].equal(before[:, :6, :12])


@needs_kernel
def test_results_do_not_depend_on_the_threads(monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        q, k, cos, sin = operands(64, 32, 8, 64, 32, torch.bfloat16)
        found.append(torch.cat(rotate_token(q, k, token_factors(cos, sin)), dim=1))
    assert all(each.equal(found[0]) for each in found)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_forms_are_rotated_in_torch(interleaved, dtype):
    q, k, cos, sin = operands(2, 4, 2, 16, 8, dtype)
    q, k = (x.clone(memory_format=torch.channels_last) for x in (q, k))
    factors = token_factors(cos, sin)
    expected = rotate_in_torch(q, k, factors, interleaved)
    for found, other in zip(rotate_token(q, k, factors, interleaved), expected, strict=True):
        assert found.equal(other)
