"""A token that is written where a tensor tells, as in a CUDA graph, and attention over a fixed extent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.attention import decode_attention, hide_places
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.scoring import Scoring, Window
from flexgen.runtime.pages import (
    Fixed,
    attend_fixed,
    attend_several,
    put,
    put_at,
    put_by_row,
    several_part,
    stretch,
)

FORMS = [PlainHeads(32, torch.float32), GroupwiseHeads(32, 4, 32)]


def pages_of(form, rows, kv_heads, tokens, count):
    """Pages with a gap after each, as in a store."""
    size = 2 * rows * kv_heads * tokens * form.width
    buffer = torch.zeros(count, size + 8, dtype=form.dtype)
    both = buffer[:, :size].view(count, 2, rows, kv_heads, tokens, form.width)
    return [(page[0], page[1]) for page in both]


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@given(
    rows=st.integers(1, 3), kv_heads=st.integers(1, 2), tokens=st.integers(1, 9), count=st.integers(1, 4),
    position=st.integers(0, 50),
)  # fmt: skip
def test_put_at_is_put_of_one_token(form, rows, kv_heads, tokens, count, position):
    """In a page, or in a ring of pages."""
    k, v = (form.encode(torch.randn(rows, kv_heads, 1, 32)) for _ in range(2))
    expected, found = (pages_of(form, rows, kv_heads, tokens, count) for _ in range(2))
    put(expected, position, k, v)
    put_at(found, torch.tensor(divmod(position % (count * tokens), tokens)), k, v)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@given(
    kv_heads=st.integers(1, 2), tokens=st.integers(1, 9), count=st.integers(1, 4),
    positions=st.lists(st.integers(0, 50), min_size=1, max_size=4),
)  # fmt: skip
def test_put_at_a_position_of_each_row(form, kv_heads, tokens, count, positions):
    rows = len(positions)
    k, v = (form.encode(torch.randn(rows, kv_heads, 1, 32)) for _ in range(2))
    expected, found = (pages_of(form, rows, kv_heads, tokens, count) for _ in range(2))
    for row, position in enumerate(positions):
        own = slice(row, row + 1)
        put([(a[own], b[own]) for a, b in expected], position, k[own], v[own])
    index = [divmod(position % (count * tokens), tokens) for position in positions]
    put_at(found, torch.tensor(index).T, k, v)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@given(
    kv_heads=st.integers(1, 2), tokens=st.integers(1, 9), count=st.integers(1, 4), new=st.integers(1, 5),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)  # fmt: skip
def test_put_by_row_is_put_of_each_row(form, kv_heads, tokens, count, new, shares):
    """Several tokens of each row, after the tokens that the row has, within pages or across them."""
    rows, room = len(shares), count * tokens
    new = min(new, room)
    lengths = [int(share * (room - new)) for share in shares]
    k, v = (form.encode(torch.randn(rows, kv_heads, new, 32)) for _ in range(2))
    expected, found = (pages_of(form, rows, kv_heads, tokens, count) for _ in range(2))
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        put([(a[own], b[own]) for a, b in expected], length, k[own], v[own])
    put_by_row(found, torch.tensor(lengths), k, v)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@given(
    rows=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), tokens=st.integers(2, 40),
    data=st.data(),
)  # fmt: skip
def test_attention_of_following_tokens_over_a_fixed_extent(form, rows, kv_heads, group, tokens, data):
    """Token after token, with one mask, as over the tokens that are there. With a window, the pages are a ring."""
    first = data.draw(st.integers(1, tokens - 1))
    starts = torch.tensor(data.draw(st.lists(st.integers(0, first - 1), min_size=rows, max_size=rows)))
    window = data.draw(st.sampled_from([None, Window(5), Window(5, chunked=True)]))
    count, page_tokens = (1, tokens) if window is None else (3, 2)
    places = count * page_tokens
    pages, plain = (
        pages_of(form, rows, kv_heads, page_tokens, count),
        pages_of(form, rows, kv_heads, tokens, 1),
    )
    for position in range(first):
        before = [form.encode(torch.randn(rows, kv_heads, 1, 32)) for _ in range(2)]
        put(pages, position, *before)
        put(plain, position, *before)
    mask = torch.empty(rows, 1, 1, places)
    scoring = Scoring(0.2, window=window)
    for length in range(first + 1, tokens + 1):
        q = torch.randn(rows, kv_heads * group, 1, 32)
        k, v = (torch.randn(rows, kv_heads, 1, 32) for _ in range(2))
        hide_places(mask, starts, length, places, window)
        extent = data.draw(st.integers(min(length, places), places))
        at = Fixed(torch.tensor(divmod((length - 1) % places, page_tokens)), mask, extent)
        put_at(pages, at.index, *form.encode_both(k, v))
        found = attend_fixed(pages, at, form, q, scoring)
        put(plain, length - 1, *form.encode_both(k, v))
        expected = decode_attention(q, plain, length, starts, scoring, form)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=["plain", "int4"])
@pytest.mark.parametrize("window", [None, Window(5)])
def test_several_tokens_as_a_part(form, window):
    """Rows with padding, in a ring of pages for a window. Alone, the part is the whole."""
    length, new, starts = 18, 3, [0, 4, 17]
    pages = pages_of(form, 3, 2, 3, 4 if window else 6)
    k, v = (form.encode(torch.randn(3, 2, length, 32)) for _ in range(2))
    put(pages, 0, k, v)
    q = torch.randn(3, 4, new, 32)
    cached = stretch(pages, 3, 0 if window is None else length - new - 4, length)
    scoring = Scoring(0.2, window=window)
    values, lse = several_part(cached, form, q, starts, length, scoring)
    expected = attend_several(cached, form, q, starts, length, scoring)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    padding = torch.arange(length - new, length) < torch.tensor(starts)[:, None]
    assert torch.equal(lse == float("-inf"), padding[:, None].expand(3, 4, new))
