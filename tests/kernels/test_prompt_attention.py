"""Causal attention of the last tokens of a prompt: each compiled variant against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flexgen.kernels.compiled_attention import prompt_compiled
from flexgen.kernels.loading import native, native_available
from flexgen.kernels.scoring import Scoring

pytestmark = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def by_token(batch, tokens, heads, dim, dtype, generator):
    """Heads as projections return them: (batch, heads, tokens, dim), stored by token."""
    return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)


def exact(q, k, v, scoring, first=None):
    """The definition: the values, and the log-sum-exp of the scores and the sinks."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    queries, tokens = q.shape[2], k.shape[2]
    scores = q @ k.mT * scoring.scale
    if scoring.cap is not None:
        scores = scoring.cap * torch.tanh(scores / scoring.cap)
    here, there = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)
    if scoring.slopes:
        scores = scores + torch.tensor(scoring.slopes).double()[:, None, None] * (there - here)
    hidden = there > here if first is None else (there > here) | (there < first[:, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    if scoring.sinks is not None:
        lse = torch.logaddexp(lse, scoring.sinks.double()[:, None])
    return (scores - lse[..., None]).exp() @ v, lse


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    dim=st.sampled_from([1, 8, 33, 64, 80]),
    queries=st.integers(1, 150),
    before=st.sampled_from([0, 0, 1, 63, 64, 100]),
    window=st.sampled_from([None, 1, 5, 70]),
    parts=st.sets(st.sampled_from(["cap", "slopes", "sinks"])),
    seed=st.integers(0, 9),
)
@example(torch.bfloat16, 1, (4, 2), 64, 300, 0, None, set(), 0)
@example(torch.bfloat16, 1, (4, 2), 64, 1, 300, None, set(), 0)
@example(torch.float32, 1, (4, 2), 64, 200, 30, 100, {"sinks"}, 0)
def test_each_token_attends_to_the_tokens_before_it(
    variant, dtype, batch, heads, dim, queries, before, window, parts, seed
):
    generator = torch.Generator().manual_seed(seed)
    count, kv_heads = heads
    tokens = before + queries
    q = by_token(batch, queries, count, dim, dtype, generator)
    k, v = (by_token(batch, tokens, kv_heads, dim, dtype, generator) for _ in range(2))
    first = None if window is None else (torch.arange(before, tokens) - window + 1).clamp_min(0)
    scoring = Scoring(
        dim**-0.5,
        2.0 if "cap" in parts else None,
        tuple(0.1 * (n + 1) for n in range(count)) if "slopes" in parts else (),
        sinks=torch.randn(count, generator=generator) if "sinks" in parts else None,
    )
    now = native.variant()
    native.set_variant(variant)
    try:
        values, lse = prompt_compiled(q, k, v, scoring, first)
    finally:
        native.set_variant(now)
    assert values.dtype is dtype and values.shape == q.shape and lse.dtype is torch.float32
    expected, expected_lse = exact(q, k, v, scoring, first)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(values.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


def test_other_layouts_of_heads(variant):
    """Contiguous heads, and those of a fused matrix."""
    generator = torch.Generator().manual_seed(0)
    scoring = Scoring(0.25)
    fused = torch.randn(2, 70, 6 * 16, generator=generator).view(2, 70, 6, 16).transpose(1, 2)
    q, k, v = fused[:, :4], fused[:, 4:5], fused[:, 5:]
    expected, _ = exact(q, k, v, scoring)
    for parts in ((q, k, v), tuple(x.contiguous() for x in (q, k, v)), (q, k.contiguous(), v)):
        values, _ = prompt_compiled(*parts, scoring)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_result_does_not_depend_on_the_threads(variant):
    generator = torch.Generator().manual_seed(0)
    q = by_token(2, 257, 8, 64, torch.bfloat16, generator)
    k, v = (by_token(2, 300, 2, 64, torch.bfloat16, generator) for _ in range(2))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(prompt_compiled(q, k, v, Scoring(0.125))[0])
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_other_types_and_no_tokens_have_no_kernel():
    x = torch.randn(1, 1, 4, 8)
    assert prompt_compiled(x.double(), x.double(), x.double(), Scoring(1.0)) is None
    assert prompt_compiled(x, x.bfloat16(), x.bfloat16(), Scoring(1.0)) is None
    assert prompt_compiled(x[:0], x[:0], x[:0], Scoring(1.0)) is None


def test_sinks_are_one_number_for_each_head():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="must be 2 numbers"):
        prompt_compiled(x, x, x, Scoring(1.0, sinks=torch.zeros(3)))
