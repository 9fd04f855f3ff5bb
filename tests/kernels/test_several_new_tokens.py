"""Decode attention of several new tokens of each row in one call, against its definition in float64."""

from __future__ import annotations

import math

import pytest
import textbook
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels.attention import attend_in_torch, decode_attention, decode_part, part_in_torch
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.partial import merge
from flexgen.kernels.scoring import Scoring, Window
from flexgen.kernels.shared_prefix import attend_prefix
from flexgen.kernels.sparse_attention import Sparsity, choose

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
DIM = 32
FORMS = [
    *(PlainHeads(DIM, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    GroupwiseHeads(DIM, 4, 16),
    GroupwiseHeads(DIM, 8, 32),
]
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 0.04}
windows = st.one_of(st.none(), st.builds(Window, st.integers(1, 60), st.booleans(), st.integers(0, 30)))


class Case:
    """Random queries of the last `new` tokens of each row, and a cache in pages of these sizes."""

    def __init__(self, form, kv_heads, group, new, pages, lengths):
        generator = torch.Generator().manual_seed(sum(pages) + new)
        dtype = torch.float32 if form.dtype is torch.uint8 else form.dtype
        rows = len(lengths)
        q = torch.randn(rows, kv_heads * group, new, DIM, generator=generator)
        k, v = torch.randn(2, rows, kv_heads, sum(pages), DIM, generator=generator).to(dtype)
        stored = [form.encode(x) for x in (k, v)]
        self.form, self.q, self.lengths = form, (2 * q).to(dtype), lengths
        cut = [[page.contiguous() for page in x.split(pages, 2)] for x in stored]
        self.pages = list(zip(*cut, strict=True))
        self.k, self.v = (torch.cat(list(form.decode(x, sum(pages), dtype)), dim=2) for x in stored)

    def expected(self, starts, scoring):
        rows = [
            textbook.attention(
                self.q[n : n + 1],
                self.k[n : n + 1, :, :length],
                self.v[n : n + 1, :, :length],
                [starts[n]],
                scoring,
            )
            for n, length in enumerate(self.lengths)
        ]
        return torch.cat(rows)

    def check(self, out, starts, scoring):
        assert out.shape == self.q.shape
        torch.testing.assert_close(
            out.double(), self.expected(starts, scoring), rtol=0, atol=LIMITS[self.q.dtype]
        )


def scoring_of(heads, cap, alibi, sinks, window):
    generator = torch.Generator().manual_seed(heads)
    slopes = tuple(torch.rand(heads, generator=generator).tolist()) if alibi else ()
    return Scoring(0.2, cap, slopes, window, torch.randn(heads, generator=generator) if sinks else None)


@relaxed
@given(
    form=st.sampled_from(FORMS),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 7]),
    new=st.integers(2, 9),
    pages=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    cap=st.sampled_from([None, 2.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    window=windows,
    uneven=st.booleans(),
    data=st.data(),
)
def test_every_scoring_of_uneven_rows(
    version, form, kv_heads, group, new, pages, cap, alibi, sinks, window, uneven, data
):
    pages[-1] += new
    total, rows = sum(pages), data.draw(st.integers(1, 3))
    ends = st.integers(new, total)
    lengths = [data.draw(ends) for _ in range(rows)] if uneven else [data.draw(ends)] * rows
    starts = [data.draw(st.integers(0, length - new)) for length in lengths]
    case = Case(form, kv_heads, group, new, pages, lengths)
    scoring = scoring_of(kv_heads * group, cap, alibi, sinks, window)
    given_starts = torch.tensor(starts) if any(starts) else None
    length = torch.tensor(lengths) if uneven else lengths[0]
    attend = attend_in_torch if version == "torch" else decode_attention
    case.check(attend(case.q, case.pages, length, given_starts, scoring, form), starts, scoring)
    part = (part_in_torch if version == "torch" else decode_part)(
        case.q, case.pages, length, given_starts, scoring, form
    )
    assert part.lse.shape == case.q.shape[:3]
    case.check(part.values, starts, scoring)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_are_split_over_threads(variant, bits, threads):
    """In some parts of the tokens, a query attends to nothing: after its position, or before its window."""
    torch.set_num_threads(threads)
    form = GroupwiseHeads(DIM, bits, 16) if bits else PlainHeads(DIM, torch.float32)
    lengths, starts = [1502, 40, 1000], [0, 34, 800]
    case = Case(form, 1, 2, 5, [700, 900], lengths)
    for scoring in (
        Scoring(0.2),
        scoring_of(2, 2.0, True, True, None),
        scoring_of(2, None, False, False, Window(3)),
        scoring_of(2, None, True, True, Window(128, chunked=True)),
    ):
        out = decode_attention(case.q, case.pages, torch.tensor(lengths), torch.tensor(starts), scoring, form)
        case.check(out, starts, scoring)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equal_to_one_token_after_another(variant, form):
    """Each query does the same arithmetic as alone, if as many others share its pass."""
    case = Case(form, 2, 8, 3, [60], [55, 31])
    scoring, lengths = Scoring(0.2), torch.tensor(case.lengths)
    out = decode_attention(case.q, case.pages, lengths, None, scoring, form)
    for n in range(3):
        alone = decode_attention(
            case.q[:, :, n : n + 1].contiguous(), case.pages, lengths - 2 + n, None, scoring, form
        )
        torch.testing.assert_close(out[:, :, n : n + 1], alone, rtol=1e-2, atol=LIMITS[case.q.dtype])


def test_later_tokens_are_never_read_and_do_not_change_earlier_ones(variant):
    form, scoring = PlainHeads(DIM, torch.float32), Scoring(0.2)
    case = Case(form, 2, 2, 4, [32, 32], [50])
    expected = decode_attention(case.q, case.pages, 50, None, scoring)
    for k, v in case.pages[1:]:
        k[:, :, 18:] = v[:, :, 18:] = math.nan  # beyond the length
    assert torch.equal(decode_attention(case.q, case.pages, 50, None, scoring), expected)
    for k, _ in case.pages[1:]:
        k[:, :, 17] = 100.0  # the last new token
    changed = decode_attention(case.q, case.pages, 50, None, scoring)
    assert torch.equal(changed[:, :, :3], expected[:, :, :3])
    assert not torch.equal(changed[:, :, 3], expected[:, :, 3])


@relaxed
@given(
    shared=st.integers(1, 150),
    new=st.integers(1, 6),
    window=windows.filter(lambda window: window is None or not window.before),
    alibi=st.booleans(),
    own=st.lists(st.integers(0, 40), min_size=1, max_size=4),
)
def test_merged_with_a_shared_prefix(version, shared, new, window, alibi, own):
    """The prefix first, then the own tokens of each row: the parts are merged to attention over both."""
    form, heads = PlainHeads(DIM, torch.float32), 4
    lengths = [n + new for n in own]
    case = Case(form, 2, 2, new, [max(lengths)], lengths)
    k, v = torch.randn(2, 2, shared, DIM)
    scoring = scoring_of(heads, None, alibi, True, window)
    part = part_in_torch if version == "torch" else decode_part
    parts = [
        part(case.q, case.pages, torch.tensor(lengths), None, scoring.after(shared), form),
        attend_prefix(case.q, k, v, scoring, shared + torch.tensor(own)),
    ]
    merged = merge(parts, torch.float32)
    for n, length in enumerate(lengths):
        whole = [
            torch.cat((some[None], x[n : n + 1, :, :length]), dim=2) for some, x in ((k, case.k), (v, case.v))
        ]
        expected = textbook.attention(case.q[n : n + 1], *whole, [0], scoring)
        torch.testing.assert_close(merged[n : n + 1].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [2, 5, torch.tensor([4, 2]), torch.tensor([3, 5])])
def test_lengths_that_do_not_fit_are_refused(length):
    case = Case(PlainHeads(DIM, torch.float32), 1, 1, 3, [4], [4, 4])
    with pytest.raises(ValueError, match=r"^lengths? .*, but the pages have 4 tokens, 3 of them new$"):
        decode_attention(case.q, case.pages, length, None, Scoring(1.0))


def test_sparse_attention_of_several_tokens_is_refused():
    case = Case(PlainHeads(DIM, torch.float32), 1, 1, 3, [4], [4])
    with pytest.raises(ValueError, match="one new token"):
        choose(case.q, case.pages, 4, None, Scoring(1.0), Sparsity(0.5))
