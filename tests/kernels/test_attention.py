"""Decode attention against the textbook formula in float64."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels import heads as heads_module
from flexgen.kernels.attention import (
    attend_fused,
    attend_in_torch,
    decode_attention,
    hidden_positions,
    hide_next_place,
    hide_places,
)
from flexgen.kernels.scoring import Scoring, Window, visible

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GARBAGE = float("nan")

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    """Random queries and a cache, cut into pages."""

    def __init__(self, dtype, rows, kv_heads, group, dim, pages, length, starts=None, unused=0.0):
        generator = torch.Generator().manual_seed(rows * 1000 + dim)
        shape = (rows, kv_heads, sum(pages), dim)
        q, k, v = (
            torch.randn(s, generator=generator).to(dtype)
            for s in ((rows, kv_heads * group, 1, dim), shape, shape)
        )
        k[:, :, length:] = v[:, :, length:] = unused
        self.q, self.k, self.v = q, k, v
        self.pages = [
            (a.contiguous(), b.contiguous())
            for a, b in zip(k.split(pages, 2), v.split(pages, 2), strict=True)
        ]
        self.length = length
        self.starts = None if starts is None else torch.tensor([min(s, length - 1) for s in starts[:rows]])
        self.scale = 1 / math.sqrt(dim)
        self.arguments = q, self.pages, length, self.starts, Scoring(self.scale)

    def expected(self):
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x[:, :, : self.length].double().repeat_interleave(group, dim=1) for x in (self.k, self.v))
        scores = self.q.double() @ k.mT * self.scale
        if self.starts is not None:
            padding = torch.arange(self.length) < self.starts[:, None]
            scores.masked_fill_(padding[:, None, None], float("-inf"))
            v = v.masked_fill(padding[:, None, :, None], 0)
        return scores.softmax(-1) @ v

    def check(self, out, version):
        assert out.dtype == self.q.dtype
        assert out.shape == self.q.shape
        assert out.is_contiguous()
        expected = self.expected()
        if self.q.dtype is torch.float32:
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-6)
        elif version == "torch":  # rounds the products and the probabilities as well
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.04)
        else:  # rounds once, at the end
            unit = torch.finfo(self.q.dtype).eps
            torch.testing.assert_close(out.double(), expected, rtol=0.51 * unit, atol=1e-5)


def attend(version):
    return attend_in_torch if version == "torch" else decode_attention


@relaxed
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 16]),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128, 256])),
    pages=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    unused=st.integers(0, 69),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 279), min_size=3, max_size=3)),
)
def test_every_shape(version, dtype, rows, kv_heads, group, dim, pages, unused, starts):
    length = sum(pages) - min(unused, pages[-1] - 1)
    case = Case(dtype, rows, kv_heads, group, dim, pages, length, starts)
    case.check(attend(version)(*case.arguments), version)


@settings(relaxed, max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    dim=st.sampled_from([64, 77, 80, 100]),
    page=st.sampled_from([64, 1000, 4096]),
    length=st.integers(600, 3000),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 2999), min_size=5, max_size=5)),
    threads=st.integers(1, 5),
)
def test_long_caches_are_split_over_threads(
    variant, dtype, rows, kv_heads, group, dim, page, length, starts, threads
):
    torch.set_num_threads(threads)
    case = Case(dtype, rows, kv_heads, group, dim, [page] * -(-length // page), length, starts)
    case.check(decode_attention(*case.arguments), variant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_every_tail_of_a_head(variant, dtype, group):
    """Elements are widened by runs, vectors and a rest: every length of these, after none, one and some runs."""
    for dim in [*range(1, 97), *range(128, 161)]:
        case = Case(dtype, 2, 1, group, dim, [21, 16], 35, [0, 6])
        case.check(decode_attention(*case.arguments), variant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_one_token_the_value_is_the_answer(variant, dtype):
    for dim in range(1, 161):
        q = torch.zeros(1, 4, 1, dim, dtype=dtype)
        k, v = torch.randn(2, 1, 1, 1, dim).to(dtype)
        assert torch.equal(decode_attention(q, [(k, v)], 1, None, Scoring(1.0)), v.expand_as(q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 9, 99])
def test_a_key_that_is_no_number_stays_in_its_own_answers(variant, dtype, broken, token):
    case = Case(dtype, 2, 2, 4, 80, [100], 100)
    expected = decode_attention(*case.arguments)
    case.q[1, :4, :, 5] = 1  # the sign of the score is that of the key
    case.pages[0][0][1, 0, token, 5] = broken
    out = decode_attention(*case.arguments)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, 4:], expected[1, 4:])
    # A score of -inf is no weight; inf less inf is no number.
    assert out[1, :4].isfinite().all() if broken == -math.inf else out[1, :4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 900])
def test_what_is_not_valid_is_never_read(variant, dtype, length):
    starts = [0, 3, length - 1]
    case = Case(dtype, 3, 2, 4, 64, [400, 400, 400][: 1 + length // 400], length, starts, GARBAGE)
    expected = decode_attention(*case.arguments)
    case.check(expected, variant)
    for row, start in enumerate(starts):
        for k, v in case.pages[:1]:
            k[row, :, : min(start, 400)] = v[row, :, : min(start, 400)] = GARBAGE
    if length > 800:
        for k, v in case.pages[:2]:
            k[2] = v[2] = GARBAGE
    assert torch.equal(decode_attention(*case.arguments), expected)


def test_scores_of_any_size_do_not_overflow(version):
    case = Case(torch.float32, 1, 1, 2, 16, [64, 64], 100)
    case.q *= 1e4
    case.check(attend(version)(*case.arguments), version)


def test_a_row_of_padding_only_is_zero(variant):
    case = Case(torch.float32, 2, 1, 1, 16, [8], 8)
    out = decode_attention(case.q, case.pages, 8, torch.tensor([8, 0]), Scoring(1.0))
    assert not out[0].any()
    assert out[1].any()


def test_callers_on_several_threads_get_what_they_get_alone(variant):
    cases = [
        Case(dtype, rows, 2, 4, 64, [512] * 4, 2000, None if rows == 1 else list(range(0, 50 * rows, 50)))
        for dtype in DTYPES
        for rows in (1, 3, 9)
    ]
    torch.set_num_threads(3)
    alone = [decode_attention(*case.arguments) for case in cases]

    def repeat(case):
        torch.set_num_threads(3)
        return [decode_attention(*case.arguments) for _ in range(5)]

    with ThreadPoolExecutor(len(cases)) as callers:
        for expected, results in zip(alone, callers.map(repeat, cases), strict=True):
            assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_public_function_takes_what_fits(dtype):
    case = Case(dtype, 2, 2, 2, 32, [16, 16], 20, [0, 4])
    torch.testing.assert_close(decode_attention(*case.arguments).double(), case.expected(), rtol=0, atol=0.04)
    strided = torch.stack((case.q, case.q), dim=-1)[..., 0]
    assert torch.equal(decode_attention(strided, *case.arguments[1:]), decode_attention(*case.arguments))


def test_no_rows():
    case = Case(torch.float32, 1, 2, 2, 8, [4], 4)
    pages = [(k[:0], v[:0]) for k, v in case.pages]
    assert decode_attention(case.q[:0], pages, 4, None, Scoring(1.0)).shape == (0, 4, 1, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, pages: (q[:, :3], pages, 4, None), "a multiple of 2 heads"),
        (lambda q, pages: (q, pages, 5, None), "length 5, but the pages have 4 tokens"),
        (lambda q, pages: (q, pages, 0, None), "length 0"),
        (lambda q, pages: (q.half(), pages, 4, None), "expected .* torch.float16"),
        (lambda q, pages: (q[..., :4], pages, 4, None), "a page has shape"),
        (lambda q, pages: (q, [(pages[0][0].mT.contiguous().mT, pages[0][1])], 4, None), "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(torch.float32, 1, 2, 2, 8, [4], 4)
    with pytest.raises(ValueError, match=message):
        decode_attention(*change(case.q, case.pages), Scoring(1.0))


@pytest.mark.parametrize("starts", [[-1, 0], [0]])
def test_starts_that_do_not_fit_are_refused(variant, starts):
    case = Case(torch.float32, 2, 2, 2, 8, [4], 4)
    with pytest.raises(ValueError, match="starts must be 2 integers of at least 0"):
        decode_attention(case.q, case.pages, 4, torch.tensor(starts), Scoring(1.0))


def joining(form, joined_bytes):
    """A format like `form` whose pages are joined in smaller parts."""
    return type("Joining", (form,), {"joined_bytes": joined_bytes})


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("starts", [None, [0, 5, 2]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_all_pages_in_one_call_are_the_same(bits, starts, heads, kv_heads):
    """What a GPU runs, for two rows at once where rows have to be joined or decoded."""
    joined = 2 * 2 * kv_heads * 30 * (16 * 4, 12)[bits > 0]
    if bits:
        form = joining(heads_module.GroupwiseHeads, joined)(16, bits, 16, gpu_values=2 * 2 * 21 * 16)
    else:
        form = joining(heads_module.PlainHeads, joined)(16, torch.float32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, n, tokens, 16, generator=generator)
        for n, tokens in ((heads, 1), (kv_heads, 30), (kv_heads, 30))
    )
    page = form.encode_both(k, v)
    begin = None if starts is None else torch.tensor(starts)
    hidden = None if begin is None else hidden_positions(begin, 30, q.dtype)
    expected = attend_in_torch(q, [page], 21, begin, Scoring(0.25), form)
    torch.testing.assert_close(attend_fused(q, [page], range(21), hidden, 0.25, form), expected)
    pages = list(zip(*(x.split(10, dim=2) for x in page), strict=True))
    torch.testing.assert_close(attend_fused(q, pages, range(21), hidden, 0.25, form), expected)


@relaxed
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 40),
    beyond=st.integers(0, 24),
    starts=st.lists(st.integers(0, 39), min_size=4, max_size=4),
)
def test_a_mask_makes_attention_over_more_positions_that_of_the_first_ones(
    dtype, rows, kv_heads, group, length, beyond, starts
):
    case = Case(dtype, rows, kv_heads, group, 32, [length + beyond], length, starts, unused=3.0)
    mask = torch.full((rows, 1, 1, length + beyond), GARBAGE, dtype=dtype)
    hide_places(mask, case.starts, length, length + beyond)
    form = heads_module.PlainHeads(32, dtype)
    found = attend_fused(case.q, case.pages, range(length + beyond), mask, case.scale, form)
    case.check(found, "torch")


@relaxed
@given(
    starts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    first=st.integers(6, 30),
    tokens=st.integers(1, 30),
    size=st.integers(1, 12),
    beyond=st.integers(0, 9),
    kind=st.sampled_from(["none", "last", "chunked"]),
)
def test_masks_of_places_show_the_positions_that_a_query_attends_to(
    starts, first, tokens, size, beyond, kind
):
    """Token after token, in a ring for a window and in a cache with a place for each position."""
    window = None if kind == "none" else Window(size, kind == "chunked")
    for places in {first + tokens + beyond} | ({size + beyond} if window else set()):
        mask = torch.full((len(starts), 1, 1, places + beyond), 3.0)
        for length in range(first, first + tokens):
            if length == first or kind == "chunked":
                hide_places(mask, torch.tensor(starts), length, places, window)
            else:
                hide_next_place(mask, length, places, window)
            for start, row in zip(starts, mask[:, 0, 0, :places], strict=True):
                seen = visible(window, range(length - 1, length), range(length), start, mask.device)[0]
                expected = {n % places for n in range(start, length) if seen[n]}
                assert {n for n, value in enumerate(row.tolist()) if value == 0} == expected
                assert set(row.tolist()) <= {0, float("-inf")}
