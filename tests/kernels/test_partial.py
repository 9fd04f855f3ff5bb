"""Decode attention as a part, with a log-sum-exp, for every format of heads."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels.attention import decode_attention, decode_part, part_in_torch
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.partial import Partial, merge, merge_in_torch
from flexgen.kernels.scoring import Scoring, Window
from flexgen.quant.codecs.fp8 import FP8Heads

relaxed = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
DIM = 32
FORMS = st.sampled_from(
    [
        PlainHeads(DIM, torch.float32),
        PlainHeads(DIM, torch.bfloat16),
        PlainHeads(DIM, torch.float16),
        GroupwiseHeads(DIM, 4, 16),
        GroupwiseHeads(DIM, 8, 32),
        FP8Heads(DIM),  # without a compiled kernel
    ]
)


def pages_of(form, k, v, page_tokens):
    stored = [form.encode(x) for x in (k, v)]
    return list(zip(*([p.contiguous() for p in x.split(page_tokens, 2)] for x in stored), strict=True))


def random_cache(form, rows, kv_heads, group, length):
    generator = torch.Generator().manual_seed(length)
    dtype = torch.float32 if form.dtype is torch.uint8 else form.dtype
    q = torch.randn(rows, kv_heads * group, 1, DIM, generator=generator).to(dtype)
    k, v = torch.randn(2, rows, kv_heads, length, DIM, generator=generator).to(dtype)
    return q, k, v


def merger(version):
    return merge_in_torch if version == "torch" else merge


@relaxed
@given(
    form=FORMS,
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8, 11]),
    length=st.integers(2, 300),
    page_tokens=st.integers(1, 300),
    cap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    window=st.one_of(st.none(), st.builds(Window, st.integers(1, 200), st.booleans(), st.integers(0, 90))),
    data=st.data(),
)
def test_parts_merge_to_decode_attention(
    version, form, rows, kv_heads, group, length, page_tokens, cap, sinks, window, data
):
    """Cut between two pages: each part attends to its own pages, and one of them has the sinks.

    Both sides are in float32, so the limit is larger than for the exact result.
    """
    q, k, v = random_cache(form, rows, kv_heads, group, length)
    starts = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=rows, max_size=rows)))
    scores = torch.randn(kv_heads * group) if sinks else None
    scoring = Scoring(1 / math.sqrt(DIM), cap, sinks=scores)
    pages = pages_of(form, k, v, page_tokens)
    whole = replace(scoring, window=window)
    part = part_in_torch if version == "torch" else decode_part
    expected = decode_attention(q, pages, length, starts, whole, form)
    alone = part(q, pages, length, starts, whole, form)
    assert alone.values.dtype is alone.lse.dtype is torch.float32
    limit = {torch.float32: 3e-6, torch.bfloat16: 0.03, torch.float16: 0.004}[q.dtype]
    torch.testing.assert_close(alone.values.to(q.dtype), expected, rtol=0, atol=limit)

    cut = data.draw(st.integers(0, len(pages) - 1))
    begin = cut * page_tokens
    first = starts if window is None else window.starts(starts, length)
    late = part(q, pages[cut:], length - begin, (first - begin).clamp_min(0), scoring, form)
    parts = [late]
    early = first < begin  # the other rows attend to nothing there
    if cut and early.any():
        plain = replace(scoring, sinks=None)
        of_rows = [(x[early].contiguous(), y[early].contiguous()) for x, y in pages[:cut]]
        found = part(q[early], of_rows, begin, first[early], plain, form)
        values, lse = torch.zeros_like(late.values), torch.full_like(late.lse, -math.inf)
        values[early], lse[early] = found
        parts.append(Partial(values, lse))
    torch.testing.assert_close(merger(version)(parts, q.dtype), expected, rtol=0, atol=limit)


@relaxed
@given(
    rows=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    length=st.integers(1, 400),
    page_tokens=st.integers(1, 128),
    cuts=st.lists(st.integers(1, 399), max_size=5),
    data=st.data(),
)
def test_attention_cut_anywhere_is_that_of_the_whole(
    version, rows, kv_heads, group, length, page_tokens, cuts, data
):
    """The tokens of each part are in pages of its own, like those of a prefix. A row may have none of them."""
    form = PlainHeads(DIM, torch.float32)
    q, k, v = random_cache(form, rows, kv_heads, group, length)
    first = data.draw(st.lists(st.integers(0, length - 1), min_size=rows, max_size=rows))
    starts, scoring = torch.tensor(first), Scoring(1 / math.sqrt(DIM))
    part = part_in_torch if version == "torch" else decode_part
    parts = []
    for begin, end in pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})):
        pages = pages_of(form, k[:, :, begin:end], v[:, :, begin:end], page_tokens)
        parts.append(part(q, pages, end - begin, (starts - begin).clamp(0, end - begin), scoring, form))
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    products = q.double() @ keys.mT / math.sqrt(DIM)
    products.masked_fill_(torch.arange(length) < starts[:, None, None, None], -math.inf)
    expected = products.softmax(-1) @ values
    torch.testing.assert_close(merger(version)(parts, torch.float32).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_log_sum_exp_of_long_caches(version, threads, sinks):
    """Tokens that are divided among threads, and a row of padding only."""
    torch.set_num_threads(threads)
    form = PlainHeads(DIM, torch.float32)
    q, k, v = random_cache(form, 2, 1, 3, 2000)
    scores = torch.randn(3) if sinks else None
    scoring = Scoring(0.3, sinks=scores)
    part = part_in_torch if version == "torch" else decode_part
    values, lse = part(q, pages_of(form, k, v, 700), 2000, torch.tensor([5, 0]), scoring)
    products = q.double() @ k.double().mT * 0.3
    products[0, :, :, :5] = -math.inf
    total = products.logsumexp(-1)
    if scores is not None:
        total = total.logaddexp(scores.double()[None, :, None])
    torch.testing.assert_close(lse.double(), total, rtol=1e-6, atol=1e-6)
    expected = (products - total.unsqueeze(-1)).exp() @ v.double()
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-6)


def test_a_row_of_padding_only_weighs_nothing(version):
    form = PlainHeads(DIM, torch.float32)
    q, k, v = random_cache(form, 2, 1, 1, 8)
    part = part_in_torch if version == "torch" else decode_part
    values, lse = part(q, [(k, v)], 8, torch.tensor([8, 0]), Scoring(1.0))
    assert not values[0].any()
    assert (lse[0] == -math.inf).all()
    assert values[1].all()
    assert lse[1].isfinite().all()
    assert merger(version)([Partial(values, lse), Partial(values, lse)], torch.float32).equal(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_parts_of_any_layout_merge_by_the_sums_of_their_exponentials(version, dtype, head_dim):
    """Several new tokens of a row; values by head and by token, and a part whose values are not adjacent."""
    shape = 2, 3, 5
    by_head = torch.randn(*shape, head_dim)
    by_token = torch.randn(2, 5, 3, head_dim).transpose(1, 2)
    apart = torch.randn(*shape, 2 * head_dim)[..., ::2]
    parts = [Partial(values, 3 * torch.randn(shape)) for values in (by_head, by_token, apart)]
    parts[1].lse[0, 1, 2] = -math.inf
    weights = torch.stack([part.lse for part in parts]).double().softmax(0).unsqueeze(-1)
    expected = sum(weight * part.values.double() for weight, part in zip(weights, parts, strict=True))
    merged = merger(version)(parts, dtype)
    assert merged.dtype is dtype
    torch.testing.assert_close(merged, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_what_is_no_number_stays(version):
    values, lse = torch.ones(1, 2, 1, 16), torch.zeros(1, 2, 1)
    broken = Partial(values.clone(), lse.clone())
    broken.values[0, 1], broken.lse[0, 1] = math.nan, math.nan
    merged = merger(version)([Partial(values, lse), broken], torch.float32)
    assert merged[0, 1].isnan().all()
    assert merged[0, 0].equal(values[0, 0])
