"""Caps, ALiBi, sinks and windows in every kernel of attention, against their definition."""

from __future__ import annotations

import pytest
import textbook
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels.attention import attend_fused, attend_in_torch, decode_attention, hidden_positions
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.scoring import Scoring, Window, alibi_slopes, visible, visible_from
from flexgen.kernels.sparse_attention import Sparsity, choose

relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
windows = st.one_of(st.none(), st.builds(Window, st.integers(1, 60), st.booleans(), st.just(0)))


def scoring_of(heads, cap, alibi, sinks, window):
    generator = torch.Generator().manual_seed(heads)
    return Scoring(
        0.3,
        cap,
        tuple(torch.rand(heads, generator=generator).tolist()) if alibi else (),
        window,
        torch.randn(heads, generator=generator) * 2 if sinks else None,
    )


def cut(x, pages):
    return [page.contiguous() for page in x.split(pages, 2)]


def attend(version):
    return attend_in_torch if version == "torch" else decode_attention


@relaxed
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 5, 8, 11]),
    dim=st.sampled_from([4, 16, 33]),
    pages=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    unused=st.integers(0, 69),
    starts=st.one_of(st.none(), st.lists(st.integers(-40, 200), min_size=2, max_size=2)),
    cap=st.sampled_from([None, 0.5, 30.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    window=windows,
)
def test_decode_attention_of_every_scoring(
    version, dtype, kv_heads, group, dim, pages, unused, starts, cap, alibi, sinks, window
):
    length, heads = sum(pages) - min(unused, pages[-1] - 1), kv_heads * group
    scoring = scoring_of(heads, cap, alibi, sinks, window)
    if window is None and starts is not None:
        starts = [max(start, 0) for start in starts]
    starts = None if starts is None else [min(start, length - 1) for start in starts]
    generator = torch.Generator().manual_seed(sum(pages))
    q = (3 * torch.randn(2, heads, 1, dim, generator=generator)).to(dtype)
    k, v = torch.randn(2, 2, kv_heads, sum(pages), dim, generator=generator).to(dtype)
    given = None if starts is None else torch.tensor(starts)
    out = attend(version)(q, list(zip(cut(k, pages), cut(v, pages), strict=True)), length, given, scoring)
    expected = textbook.attention(q, k[:, :, :length], v[:, :, :length], starts or [0, 0], scoring)
    limit = 1e-5 if dtype is torch.float32 else 0.04
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_caches_split_over_threads_and_encoded(variant, bits, threads):
    """A sink counts once, whether tokens are divided among threads or not."""
    torch.set_num_threads(threads)
    form = GroupwiseHeads(32, bits, 16) if bits else PlainHeads(32, torch.float32)
    heads, tokens = 6, 1500
    generator = torch.Generator().manual_seed(bits)
    q = torch.randn(1, heads, 1, 32, generator=generator)
    k, v = torch.randn(2, 1, 2, tokens, 32, generator=generator)
    kept = [form.encode(x) for x in (k, v)]
    decoded = [torch.cat(list(form.decode(x, tokens, torch.float32)), dim=2) for x in kept]
    pages = list(zip(*(cut(x, [500, 400, 600]) for x in kept), strict=True))
    for scoring in (
        scoring_of(heads, 2.0, True, True, None),
        scoring_of(heads, 2.0, True, True, Window(1100)),
        scoring_of(heads, None, False, True, Window(700, chunked=True)),
    ):
        out = decode_attention(q, pages, 1450, torch.tensor([7]), scoring, form)
        seen = [x[:, :, :1450] for x in decoded]
        torch.testing.assert_close(
            out.double(), textbook.attention(q, *seen, [7], scoring), rtol=0, atol=1e-5
        )


def test_keys_outside_of_a_window_are_never_read(variant):
    k, v = torch.randn(2, 1, 1, 64, 8)
    q, scoring = torch.randn(1, 2, 1, 8), Scoring(1.0, window=Window(20))
    expected = decode_attention(q, [(k, v)], 60, None, scoring)
    k[:, :, :40] = v[:, :, :40] = float("nan")
    assert torch.equal(decode_attention(q, [(k, v)], 60, None, scoring), expected)
    assert expected.isfinite().all()


def test_a_sink_far_above_or_below_the_scores(version):
    k, v = torch.randn(2, 1, 1, 8, 4)
    q = torch.randn(1, 2, 1, 4)
    sinks = torch.tensor([300.0, -300.0])
    out = attend(version)(q, [(k, v)], 8, None, Scoring(1.0, sinks=sinks))
    plain = attend(version)(q, [(k, v)], 8, None, Scoring(1.0))
    assert not out[0, 0].any()
    torch.testing.assert_close(out[0, 1], plain[0, 1])


@pytest.mark.parametrize("cap", [0.1, 50.0])
def test_a_cap_limits_scores_of_any_size(version, cap):
    k, v = torch.randn(2, 1, 1, 40, 4)
    q = 1e20 * torch.randn(1, 2, 1, 4)
    scoring = Scoring(1.0, cap)
    out = attend(version)(q, [(k, v)], 40, None, scoring)
    torch.testing.assert_close(out.double(), textbook.attention(q, k, v, [0], scoring), rtol=0, atol=1e-5)


@pytest.mark.parametrize("starts", [None, [0, 5, 30]])
@pytest.mark.parametrize("pages", [[40], [10, 20, 10]])
def test_fused_attention_over_a_part_of_the_positions(starts, pages):
    """What a GPU runs for a window."""
    q = torch.randn(3, 4, 1, 8)
    k, v = torch.randn(2, 3, 2, 40, 8)
    scoring = Scoring(0.5, window=Window(12))
    hidden = None if starts is None else hidden_positions(torch.tensor(starts) - 24, 12, q.dtype)
    every = list(zip(cut(k, pages), cut(v, pages), strict=True))
    out = attend_fused(q, every, range(36 - 12, 36), hidden, 0.5, PlainHeads(8, q.dtype))
    expected = textbook.attention(q, k[:, :, :36], v[:, :, :36], starts or [0] * 3, scoring)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@given(size=st.integers(1, 9), chunked=st.booleans(), length=st.integers(1, 30), start=st.integers(-9, 29))
def test_the_first_visible_position(size, chunked, length, start):
    window, start = Window(size, chunked), min(start, length - 1)
    seen = [
        key for key in range(length) if textbook.sees(Scoring(1.0, window=window), length - 1, key, start)
    ]
    first = visible_from(window, torch.tensor([start]), length, 1, torch.device("cpu"))
    assert first is not None
    assert seen == list(range(int(first[0]), length))
    assert max(window.first(length - 1 - start) + start, 0) == seen[0]
    mask = visible(window, range(length - 1, length), range(max(start, 0), length), start, first.device)
    assert mask.sum() == len(seen)


@given(size=st.integers(1, 9), before=st.integers(0, 20), length=st.integers(1, 20), start=st.integers(0, 19))
def test_chunks_of_a_window_begin_before_the_row(size, before, length, start):
    """The first tokens of the text are stored elsewhere, and padding is before the others."""
    start = min(start, length - 1)
    text = before + length - start  # without padding
    scoring = Scoring(1.0, window=Window(size, chunked=True))
    seen = [key for key in range(text) if textbook.sees(scoring, text - 1, key, 0)]
    window = scoring.after(before).window
    assert window is not None
    expected = max(seen[0] - before, 0)
    assert window.first(length - 1 - start) == expected
    first = visible_from(window, torch.tensor([start]), length, 1, torch.device("cpu"))
    assert first is not None
    assert int(first[0]) == expected + start
    mask = visible(window, range(length - 1, length), range(start, length), start, first.device)
    assert mask.sum() == text - before - expected
    unpadded = visible_from(window, None, length, 1, first.device)
    last = before + length
    begin = max((last - 1) // size * size - before, 0)
    assert (0 if unpadded is None else int(unpadded[0])) == begin


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(4, [2**-2, 2**-4, 2**-6, 2**-8]), (3, [2**-4, 2**-8, 2**-2]), (1, [2**-8])],
)
def test_slopes_of_alibi(heads, slopes):
    assert alibi_slopes(heads) == tuple(slopes)


@pytest.mark.parametrize(
    "scoring", [Scoring(1.0, 5.0), Scoring(1.0, window=Window(3)), Scoring(1.0, sinks=torch.zeros(1))]
)
def test_sparse_attention_refuses_what_it_does_not_compute(scoring):
    page = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="plain scores without a window"):
        choose(torch.zeros(1, 1, 1, 8), [(page, page)], 4, None, scoring, Sparsity(0.5))


def test_sinks_and_slopes_that_do_not_fit_are_refused(variant):
    page = torch.zeros(1, 1, 4, 8)
    for scoring in (Scoring(1.0, sinks=torch.zeros(3)), Scoring(1.0, slopes=(1.0,))):
        with pytest.raises(ValueError, match="must be 2 numbers on cpu, one per head"):
            decode_attention(torch.zeros(1, 2, 1, 8), [(page, page)], 4, None, scoring)
