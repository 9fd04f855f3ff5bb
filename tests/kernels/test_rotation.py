"""Rotary positions: the compiled kernel against float64 and against torch."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.loading import native, native_available
from flexgen.kernels.rotation import (
    pairs_of,
    rotate_in_torch,
    rotate_natively,
    rotate_token,
    rotate_tokens,
    rotates_tokens,
    token_factors,
)

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []


@contextmanager
def computed_by(variant):
    before = native.variant()
    native.set_variant(variant)
    try:
        yield
    finally:
        native.set_variant(before)


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
    plain, wide = rotate_in_torch(q, k, factors), [x.double() for x in (q, k)]
    with computed_by(variant):
        found = rotate_natively(q, k, factors)
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


def test_the_factors_of_several_tokens_are_those_of_each():
    cos, sin = torch.rand(2, 3, 1, 5, 8)[:, :, :, :, :4]
    factors = token_factors(cos, sin)
    assert factors.shape == (3 * 5, 4, 1, 4)
    for row in range(3):
        for token in range(5):
            alone = [x[row : row + 1, :, token : token + 1] for x in (cos, sin)]
            assert factors[5 * row + token].equal(token_factors(*alone)[0])


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


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    seq=st.integers(1, 6),
    others=st.integers(0, 2),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 20),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_tokens_are_rotated_as_in_torch(variant, batch, heads, seq, others, pairs, rest, dtype, seed):
    """In a fused product, the heads of the queries are followed by other heads, which do not change."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(batch, seq, heads + others, 2 * pairs + rest, generator=generator).to(dtype)
    angles = torch.rand(batch, 1, seq, pairs, generator=generator) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before, x = product.clone(), product[:, :, :heads].transpose(1, 2)
    first, second = pairs_of(x[..., : 2 * pairs], interleaved=False)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    with computed_by(variant):
        assert rotates_tokens(x, cos)
        found = rotate_tokens(x, cos, sin)
    assert found[..., : 2 * pairs].equal(turned)
    kept = before[:, :, :heads].transpose(1, 2)
    assert found[..., 2 * pairs :].equal(kept[..., 2 * pairs :])
    assert product[:, :, heads:].equal(before[:, :, heads:])


@needs_kernel
def test_heads_that_are_not_stored_by_token_are_left_to_torch():
    x, cos = torch.ones(2, 3, 4, 8, dtype=torch.bfloat16), torch.ones(2, 1, 4, 4, dtype=torch.bfloat16)
    by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert rotates_tokens(by_token, cos)
    assert not rotates_tokens(x, cos)
    assert not rotates_tokens(by_token.float(), cos.float())
    assert not rotates_tokens(by_token, cos[:1])
    assert not rotates_tokens(by_token[:, :, ::2], cos[:, :, ::2].expand(2, 1, 2, 4)[:1])
