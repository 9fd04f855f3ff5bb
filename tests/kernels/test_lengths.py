"""Rows of one call with different lengths: each result equals that of the row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels.attention import (
    attend_fused,
    attend_in_torch,
    decode_attention,
    hide_next_place,
    hide_places,
)
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.scoring import Scoring, Window, alibi_slopes
from flexgen.kernels.sparse_attention import (
    Sparsity,
    attend_chosen_in_torch,
    attend_chosen_natively,
    choose_in_torch,
    choose_natively,
)
from tests.kernels.test_attention import DTYPES

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCORINGS = [
    Scoring(0.2),
    Scoring(0.2, cap=2.0),
    Scoring(0.2, slopes=alibi_slopes(4)),
    Scoring(0.2, slopes=alibi_slopes(4), sinks=torch.tensor([0.5, -1.0, 0.0, 2.0])),
    Scoring(0.2, window=Window(9)),
    Scoring(0.2, window=Window(9, chunked=True)),
]
KV_HEADS, HEADS, DIM = 2, 4, 32


def attend(version):
    return attend_in_torch if version == "torch" else decode_attention


def cache(form, rows, pages, seed=0):
    """Queries (rows, 4, 1, 32), and encoded keys and values in pages of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, HEADS, 1, DIM, generator=generator)
    k, v = torch.randn(2, rows, KV_HEADS, sum(pages), DIM, generator=generator)
    if form.dtype is not torch.uint8:
        q, k, v = (x.to(form.dtype) for x in (q, k, v))
    both = [form.encode(x).split(pages, dim=2) for x in (k, v)]
    return q, [(a.contiguous(), b.contiguous()) for a, b in zip(*both, strict=True)]


def drawn_lengths(data, rows, places):
    """Lengths, and starts below them or None."""
    lengths = data.draw(st.lists(st.integers(1, places), min_size=rows, max_size=rows))
    starts = data.draw(st.one_of(st.none(), st.tuples(*(st.integers(0, n - 1) for n in lengths))))
    return torch.tensor(lengths), None if starts is None else torch.tensor(starts)


def row_of(x, row):
    return None if x is None else x[row : row + 1]


def alone(row, q, pages, starts):
    """The arguments `q`, `pages` and `starts` of one row."""
    return q[row : row + 1], [(k[row : row + 1], v[row : row + 1]) for k, v in pages], row_of(starts, row)


@relaxed
@given(
    form=st.sampled_from(
        [
            *(PlainHeads(DIM, dtype) for dtype in DTYPES),
            GroupwiseHeads(DIM, 4, 16),
            GroupwiseHeads(DIM, 8, 32),
        ]
    ),
    rows=st.integers(1, 5),
    pages=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    scoring=st.sampled_from(SCORINGS),
    data=st.data(),
)
def test_each_row_is_as_alone(version, form, rows, pages, scoring, data):
    q, stored = cache(form, rows, pages)
    lengths, starts = drawn_lengths(data, rows, sum(pages))
    out = attend(version)(q, stored, lengths, starts, scoring, form)
    for row, length in enumerate(lengths.tolist()):
        q_row, pages_row, start = alone(row, q, stored, starts)
        expected = attend(version)(q_row, pages_row, length, start, scoring, form)
        limit = 1e-5 if q.dtype is torch.float32 else 0.02
        torch.testing.assert_close(out[row : row + 1], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_are_split_over_threads(variant, bits, threads):
    """Some parts of the tokens are beyond the end of a row, or before its start."""
    torch.set_num_threads(threads)
    form = GroupwiseHeads(DIM, bits, 16) if bits else PlainHeads(DIM, torch.float32)
    q, pages = cache(form, 3, [700, 900])
    lengths, starts = torch.tensor([1500, 40, 1000]), torch.tensor([0, 39, 800])
    for scoring in SCORINGS:
        out = decode_attention(q, pages, lengths, starts, scoring, form)
        expected = attend_in_torch(q, pages, lengths, starts, scoring, form)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_tokens_beyond_the_end_of_a_row_are_never_read(variant):
    q, pages = cache(PlainHeads(DIM, torch.float32), 3, [20, 20])
    lengths = torch.tensor([33, 1, 20])
    for scoring in SCORINGS:
        expected = decode_attention(q, pages, lengths, None, scoring)
        broken = [(k.clone(), v.clone()) for k, v in pages]
        for row, length in enumerate(lengths.tolist()):
            for begin, (k, v) in zip((0, 20), broken, strict=True):
                k[row, :, max(length - begin, 0) :] = v[row, :, max(length - begin, 0) :] = float("nan")
        assert torch.equal(decode_attention(q, broken, lengths, None, scoring), expected)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 5], [3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    q, pages = cache(PlainHeads(DIM, torch.float32), 2, [4])
    with pytest.raises(ValueError, match=r"^lengths "):
        decode_attention(q, pages, torch.tensor(lengths), None, Scoring(1.0))


@relaxed
@given(
    rows=st.integers(1, 4),
    pages=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    unit=st.sampled_from([1, 4]),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    data=st.data(),
)
def test_each_row_chooses_as_alone(version, rows, pages, unit, share, data):
    choose, attend_chosen = (
        (choose_in_torch, attend_chosen_in_torch)
        if version == "torch"
        else (choose_natively, attend_chosen_natively)
    )
    q, stored = cache(PlainHeads(DIM, torch.float32), rows, pages)
    lengths, starts = drawn_lengths(data, rows, sum(pages))
    sparsity, scoring = Sparsity(share, unit), Scoring(0.2)
    choice = choose(q, stored, lengths, starts, scoring, sparsity)
    out = attend_chosen(choice, stored)
    for row, length in enumerate(lengths.tolist()):
        q_row, pages_row, start = alone(row, q, stored, starts)
        own = choose(q_row, pages_row, length, start, scoring, sparsity)
        assert set(choice.positions[row].flatten().tolist()) == set(own.positions.flatten().tolist())
        torch.testing.assert_close(out[row : row + 1], attend_chosen(own, pages_row), rtol=1e-5, atol=1e-5)


@given(
    starts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    tokens=st.integers(1, 20),
    size=st.integers(1, 12),
    beyond=st.integers(0, 9),
    kind=st.sampled_from(["none", "last", "chunked"]),
    data=st.data(),
)
def test_masks_of_places_by_row(starts, tokens, size, beyond, kind, data):
    """Token after token: each row of a mask is that of a mask for its own length."""
    window = None if kind == "none" else Window(size, kind == "chunked")
    first = torch.tensor([data.draw(st.integers(start + 1, 30)) for start in starts])
    for places in {30 + tokens + beyond} | ({size + beyond} if window else set()):
        mask = torch.full((len(starts), 1, 1, places), 3.0)
        for token in range(tokens):
            lengths = first + token
            if not token or kind == "chunked":
                hide_places(mask, torch.tensor(starts), lengths, places, window)
            else:
                hide_next_place(mask, lengths, places, window)
            for row, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=True)):
                expected = torch.full((1, 1, 1, places), 3.0)
                hide_places(expected, torch.tensor([start]), length, places, window)
                assert torch.equal(mask[row : row + 1], expected)


def test_fused_attention_over_all_places():
    """What a GPU runs: one mask, and the shape of the operation does not depend on the lengths."""
    q, pages = cache(PlainHeads(DIM, torch.float32), 3, [40])
    lengths, starts = torch.tensor([40, 7, 23]), torch.tensor([4, 0, 22])
    mask = torch.empty(3, 1, 1, 40)
    hide_places(mask, starts, lengths, 40)
    found = attend_fused(q, pages, range(40), mask, 0.2, PlainHeads(DIM, torch.float32))
    torch.testing.assert_close(found, attend_in_torch(q, pages, lengths, starts, Scoring(0.2)))
