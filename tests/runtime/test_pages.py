"""A token that is written where a tensor tells, as in a CUDA graph, and attention over a fixed extent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.attention import decode_attention, hide_positions
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.scoring import Scoring
from flexgen.runtime.pages import Fixed, attend_fixed, put, put_at

FORMS = [PlainHeads(32, torch.float32), GroupwiseHeads(32, 4, 32)]


def page_of(form, rows, kv_heads, tokens):
    both = torch.zeros(2, rows, kv_heads, tokens, form.width, dtype=form.dtype)
    return both[0], both[1]


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@given(rows=st.integers(1, 3), kv_heads=st.integers(1, 2), tokens=st.integers(1, 9), data=st.data())
def test_put_at_is_put_of_one_token(form, rows, kv_heads, tokens, data):
    position = data.draw(st.integers(0, tokens - 1))
    k, v = (form.encode(torch.randn(rows, kv_heads, 1, 32)) for _ in range(2))
    expected, found = (page_of(form, rows, kv_heads, tokens) for _ in range(2))
    put([expected], position, k, v)
    put_at(found, torch.tensor([position]), k, v)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@given(
    rows=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), tokens=st.integers(2, 40),
    data=st.data(),
)  # fmt: skip
def test_attention_of_following_tokens_over_a_fixed_extent(form, rows, kv_heads, group, tokens, data):
    """Token after token, with one mask, as over the tokens that are there."""
    first = data.draw(st.integers(1, tokens - 1))
    extents = data.draw(st.lists(st.integers(0, tokens), min_size=tokens, max_size=tokens))
    starts = torch.tensor(data.draw(st.lists(st.integers(0, first - 1), min_size=rows, max_size=rows)))
    page, plain = page_of(form, rows, kv_heads, tokens), page_of(form, rows, kv_heads, tokens)
    before = [form.encode(torch.randn(rows, kv_heads, first, 32)) for _ in range(2)]
    for each in (page, plain):
        put([each], 0, *before)
    mask = torch.empty(rows, 1, 1, tokens)
    hide_positions(mask, starts, first)
    for length in range(first + 1, tokens + 1):
        q = torch.randn(rows, kv_heads * group, 1, 32)
        k, v = (torch.randn(rows, kv_heads, 1, 32) for _ in range(2))
        mask[..., length - 1].zero_()
        scoring = Scoring(0.2)
        at = Fixed(torch.tensor([length - 1]), mask, max(length, extents[length - 1]))
        put_at(page, at.index, *form.encode_both(k, v))
        found = attend_fixed(page, at, form, q, scoring)
        put([plain], length - 1, *form.encode_both(k, v))
        expected = decode_attention(q, [plain], length, starts, scoring, form)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
