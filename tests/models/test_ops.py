"""The two attention functions, compared with the textbook formula for many shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.rotation import rotate_token, token_factors
from flexgen.kernels.scoring import Scoring, Window
from flexgen.models import ops
from flexgen.models.ops import apply_rope, causal_attention, query_blocks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _textbook(q, k, v, starts, scale):
    """Attention in float64; query t stands at position keys - queries + t."""
    group, keys, queries = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    position = torch.arange(keys)
    allowed = position <= torch.arange(keys - queries, keys)[:, None]
    allowed = allowed & (position >= torch.tensor(starts)[:, None, None])
    scores = (q.double() @ k.mT * scale).masked_fill(~allowed[:, None], float("-inf"))
    return (scores.softmax(-1).nan_to_num() @ v).to(q.dtype)


def _tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


shapes = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([2, 6]))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40)
@given(shape=shapes, seq=st.integers(1, 9), starts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_causal_attention(device, shape, seq, starts):
    kv_heads, group, dim = shape
    batch, starts = len(starts), [min(start, seq) for start in starts]
    q, k, v = _tensors(0, (batch, kv_heads * group, seq, dim), *[(batch, kv_heads, seq, dim)] * 2)
    out = causal_attention(q.to(device), k.to(device), v.to(device), starts, Scoring(0.3)).cpu()
    torch.testing.assert_close(out, _textbook(q, k, v, starts, 0.3), rtol=0, atol=1e-5)
    for row, start in enumerate(starts):
        assert not out[row, :, :start].any()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(
    shape=shapes,
    seq=st.integers(1, 14),
    queries=st.integers(1, 14),
    starts=st.lists(st.integers(-9, 14), min_size=1, max_size=4),
    cap=st.sampled_from([None, 0.7]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    window=st.one_of(st.none(), st.builds(Window, st.integers(1, 9), st.booleans(), st.just(0))),
)
def test_causal_attention_of_every_scoring(device, shape, seq, queries, starts, cap, alibi, sinks, window):
    kv_heads, group, dim = shape
    heads, batch, queries = kv_heads * group, len(starts), min(queries, seq)
    starts = [min(start, seq) if window is not None else min(max(start, 0), seq) for start in starts]
    q, k, v, both = _tensors(0, (batch, heads, queries, dim), *[(batch, kv_heads, seq, dim)] * 2, (2, heads))
    slopes = tuple(both[0].tolist()) if alibi else ()
    scoring = Scoring(0.3, cap, slopes, window, both[1].to(device) if sinks else None)
    out = causal_attention(q.to(device), k.to(device), v.to(device), starts, scoring).cpu()
    expected = textbook.attention(q, k, v, starts, replace(scoring, sinks=both[1] if sinks else None))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40)
@given(
    shape=shapes,
    pages=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    unused=st.integers(0, 4),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 19), min_size=3, max_size=3)),
)
def test_decode_attention(device, shape, pages, unused, starts):
    (kv_heads, group, dim), rows = shape, 3
    length = sum(pages) - min(unused, pages[-1] - 1)
    q, k, v = _tensors(1, (rows, kv_heads * group, 1, dim), *[(rows, kv_heads, sum(pages), dim)] * 2)
    k[:, :, length:] = v[:, :, length:] = 0
    cut = [
        (page_k.contiguous().to(device), page_v.contiguous().to(device))
        for page_k, page_v in zip(k.split(pages, 2), v.split(pages, 2), strict=True)
    ]
    begins = [min(start, length - 1) for start in starts or [0] * rows]
    padding = torch.tensor(begins, device=device) if starts else None
    out = decode_attention(q.to(device), cut, length, padding, Scoring(0.3)).cpu()
    expected = _textbook(q, k[:, :, :length], v[:, :, :length], begins, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype):
    q, k, v = _tensors(2, (2, 8, 1, 16), (2, 2, 64, 16), (2, 2, 64, 16))
    low = [x.to(dtype) for x in (q, k, v)]
    pages = [
        (low[1][:, :, i : i + 16].contiguous(), low[2][:, :, i : i + 16].contiguous())
        for i in (0, 16, 32, 48)
    ]
    expected = _textbook(q, k, v, [0, 0], 0.25)
    out = decode_attention(low[0], pages, 64, None, Scoring(0.25))
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)
    prompt = causal_attention(low[1].repeat(1, 4, 1, 1), low[1], low[2], [0, 5], Scoring(0.25))
    assert prompt.dtype == dtype
    assert prompt.isfinite().all()


@given(
    keys=st.integers(1, 40),
    queries=st.integers(1, 40),
    window=st.one_of(st.none(), st.builds(Window, st.integers(1, 50), st.booleans(), st.just(0))),
    most=st.integers(1, 300),
    start=st.integers(-7, 0),
)
def test_query_blocks(keys, queries, window, most, start):
    """Blocks cover the queries in order, with all keys that these see, within the limit where one query fits."""
    queries = min(queries, keys)
    blocks = list(query_blocks(queries, keys, window, most, start))
    assert [n for block, _ in blocks for n in block] == list(range(keys - queries, keys))
    for block, seen in blocks:
        first = 0 if window is None else max(window.first(block.start - start) + start, 0)
        assert seen == range(first, block.stop)
        assert len(block) * len(seen) <= most or len(block) == 1


@pytest.mark.parametrize(
    "scoring",
    [Scoring(0.4, window=Window(700)), Scoring(0.4, 2.0), Scoring(0.4, 2.0, window=Window(600, True))],
)
def test_a_prompt_of_several_blocks(scoring):
    q, k, v = _tensors(0, (1, 4, 1500, 4), (1, 2, 1500, 4), (1, 2, 1500, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "MASK_VALUES", 1 << 16)
        patch.setattr(ops, "SCORE_VALUES", 1 << 18)
        out = causal_attention(q, k, v, [20], scoring)
    for last in (1, 21, 700, 1499):  # a query alone
        alone = textbook.attention(
            q[:, :, last : last + 1], k[:, :, : last + 1], v[:, :, : last + 1], [20], scoring
        )
        torch.testing.assert_close(out[:, :, last : last + 1].double(), alone, rtol=0, atol=1e-5)


def test_a_prompt_without_padding_is_one_call_and_equals_explicit_zeros():
    q, k, v = _tensors(3, (2, 4, 5, 4), (2, 4, 5, 4), (2, 4, 5, 4))
    assert torch.equal(
        causal_attention(q, k, v, None, Scoring(0.5)), causal_attention(q, k, v, [0, 0], Scoring(0.5))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_rotated_as_a_prompt_is(dtype):
    q, k = torch.randn(3, 4, 1, 16).to(dtype), torch.randn(3, 2, 1, 16).to(dtype)
    cos, sin = (torch.rand(3, 1, 1, 8).to(dtype) for _ in range(2))
    rotated = rotate_token(q.clone(), k.clone(), token_factors(cos, sin))
    for found, x in zip(rotated, (q, k), strict=True):
        torch.testing.assert_close(found, apply_rope(x, cos, sin), rtol=0, atol=0)
