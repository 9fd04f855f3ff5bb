"""Attention over a shared prefix, merged with that over each row's own tokens, against the definition."""

from __future__ import annotations

import math

import pytest
import textbook
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels.attention import decode_part, part_in_torch
from flexgen.kernels.partial import merge
from flexgen.kernels.scoring import Scoring, Window
from flexgen.kernels.shared_prefix import attend_prefix
from flexgen.models.ops import causal_part

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float16: 0.004}

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scoring_of(heads, dim, cap=None, alibi=False, sinks=False, window=None):
    generator = torch.Generator().manual_seed(heads)
    return Scoring(
        1 / math.sqrt(dim),
        cap,
        tuple(torch.rand(heads, generator=generator).tolist()) if alibi else (),
        window,
        torch.randn(heads, generator=generator) * 2 if sinks else None,
    )


class Case:
    """A prefix, and rows whose own tokens are padded at the left. The last `new` of them are queries."""

    def __init__(self, dtype, rows, kv_heads, group, dim, prefix, own, new, starts):
        generator = torch.Generator().manual_seed(rows * 1000 + dim)

        def some(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.q = some(rows, kv_heads * group, new, dim)
        self.prefix = some(kv_heads, prefix, dim), some(kv_heads, prefix, dim)
        self.own = some(rows, kv_heads, own, dim), some(rows, kv_heads, own, dim)
        self.starts = starts
        self.positions = torch.tensor([prefix + own - new - start for start in starts])

    def prefix_parts(self, attend, scoring, cuts=()):
        """One part for each piece of the prefix between `cuts`."""
        k, v = self.prefix
        ends = [*cuts, k.shape[1]]
        return [
            attend(self.q, k[:, begin:end], v[:, begin:end], scoring, self.positions, begin)
            for begin, end in zip([0, *cuts], ends, strict=True)
        ]

    def check(self, out, scoring):
        tokens, new = self.own[0].shape[2], self.q.shape[2]
        assert out.shape == self.q.shape
        assert out.dtype is self.q.dtype
        for row, start in enumerate(self.starts):
            k, v = (
                torch.cat((a, b[row, :, start:]), dim=1)[None]
                for a, b in zip(self.prefix, self.own, strict=True)
            )
            padded = max(start - (tokens - new), 0)
            expected = textbook.attention(self.q[row : row + 1, :, padded:], k, v, [0], scoring)
            torch.testing.assert_close(
                out[row : row + 1, :, padded:].double(), expected, rtol=0, atol=LIMITS[out.dtype]
            )


@pytest.fixture
def attend(version, monkeypatch):
    if version == "torch":
        monkeypatch.setattr("flexgen.kernels.shared_prefix.prefix_compiled", lambda *_: None)
    return attend_prefix


@relaxed
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5, 8]),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128])),
    prefix=st.integers(1, 150),
    own=st.integers(1, 40),
    cap=st.sampled_from([None, 0.5, 30.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    window=st.one_of(st.none(), st.builds(Window, st.integers(1, 120), st.booleans())),
    data=st.data(),
)
def test_cut_anywhere_and_merged_it_is_attention_over_all_tokens(
    attend, version, dtype, rows, kv_heads, group, dim, prefix, own, cap, alibi, sinks, window, data
):
    new = data.draw(st.integers(1, min(own, 5)))
    starts = data.draw(st.lists(st.integers(0, own - 1), min_size=rows, max_size=rows))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(prefix - 1, 1)), max_size=3)) - {prefix})
    case = Case(dtype, rows, kv_heads, group, dim, prefix, own, new, starts)
    scoring = scoring_of(kv_heads * group, dim, cap, alibi, sinks, window)
    parts = case.prefix_parts(attend, scoring, cuts)
    after = scoring.after(prefix)
    case.check(merge([*parts, causal_part(case.q, *case.own, starts, after)], dtype), scoring)
    if new == 1:
        decode = part_in_torch if version == "torch" else decode_part
        mine = decode(case.q, [case.own], own, torch.tensor(starts), after)
        case.check(merge([mine, *parts], dtype), scoring)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 500, 1025])
def test_the_log_sum_exp_is_that_of_the_scores(attend, dtype, tokens):
    case = Case(dtype, 3, 2, 3, 48, tokens, 1, 1, [0, 0, 0])
    scoring = scoring_of(6, 48)
    values, lse = attend(case.q, *case.prefix, scoring)
    assert values.dtype is lse.dtype is torch.float32
    k, v = (x.double().repeat_interleave(3, dim=0) for x in case.prefix)
    scores = case.q.double() @ k.mT * scoring.scale
    limit = 1e-6 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=limit)
    torch.testing.assert_close(values.double(), scores.softmax(-1) @ v, rtol=0, atol=LIMITS[dtype])


def test_results_do_not_depend_on_the_number_of_threads(variant):
    """Few tasks, so tokens are divided among them."""
    case = Case(torch.float32, 3, 2, 3, 32, 1025, 1, 1, [0, 0, 0])
    scoring = scoring_of(6, 32, window=Window(700))
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(attend_prefix(case.q, *case.prefix, scoring, case.positions))
    for values, lse in found[1:]:
        assert torch.equal(values, found[0].values)
        assert torch.equal(lse, found[0].lse)


def test_a_query_that_attends_to_no_token_of_the_prefix(attend):
    """The window of the first row is past the prefix; the query of the second is padding."""
    case = Case(torch.float32, 3, 1, 2, 16, 20, 9, 1, [0, 0, 0])
    scoring = scoring_of(2, 16, window=Window(8))
    positions = torch.tensor([28, 19, 24])
    values, lse = attend(case.q, *case.prefix, scoring, positions)
    assert not values[:2].any()
    assert (lse[:2] == -math.inf).all()
    assert values[2].all()
    assert lse[2].isfinite().all()
    empty = merge([attend(case.q, *case.prefix, scoring, positions)] * 2, torch.float32)
    assert not empty[:2].any()
    assert empty[2].all()


def test_scores_of_any_size_do_not_overflow(attend):
    """They have errors in proportion to their size."""
    case = Case(torch.float32, 2, 1, 2, 16, 90, 4, 1, [0, 0])
    case.q *= 1e4
    scoring = scoring_of(2, 16)
    parts = case.prefix_parts(attend, scoring, [40])
    out = merge([*parts, decode_part(case.q, [case.own], 4, None, scoring)], torch.float32)
    k, v = (
        torch.cat((a.expand(2, 1, 90, 16), b), dim=2).double()
        for a, b in zip(case.prefix, case.own, strict=True)
    )
    expected = (case.q.double() @ k.mT * scoring.scale).softmax(-1) @ v
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-3)


def test_what_is_no_number_stays_in_its_own_answers(attend):
    case = Case(torch.float32, 2, 2, 2, 16, 90, 4, 1, [0, 0])
    scoring = scoring_of(4, 16)
    expected, _ = attend(case.q, *case.prefix, scoring)
    case.q[1, 0, 0, 5] = math.nan
    prefix = attend(case.q, *case.prefix, scoring)
    out = merge([prefix, decode_part(case.q, [case.own], 4, None, scoring)], torch.float32)
    assert prefix.values[1, 0].isnan().all()
    assert out[1, 0].isnan().all()
    assert torch.equal(prefix.values[0], expected[0])
    assert torch.equal(prefix.values[1, 1:], expected[1, 1:])


@pytest.mark.parametrize("at_once", [1, 100, 5000])
def test_scores_in_torch_are_built_for_a_few_queries_at_a_time(monkeypatch, at_once):
    case = Case(torch.float32, 3, 2, 2, 16, 50, 7, 6, [0, 3, 5])
    scoring = scoring_of(4, 16, window=Window(40))
    whole = attend_prefix(case.q, *case.prefix, scoring, case.positions)
    monkeypatch.setattr("flexgen.kernels.shared_prefix.prefix_compiled", lambda *_: None)
    monkeypatch.setattr("flexgen.kernels.shared_prefix.SCORE_VALUES", at_once)
    found = attend_prefix(case.q, *case.prefix, scoring, case.positions)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :3], k, v), "a multiple of kv_heads heads"),
        (lambda q, k, v: (q[..., :8], k, v), "expected .* head_dim"),
        (lambda q, k, v: (q, k, v[:, :5]), "q has shape"),
        (lambda q, k, v: (q, k.half(), v.half()), "k torch.float16 on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(torch.float32, 2, 2, 2, 16, 10, 4, 1, [0, 0])
    with pytest.raises(ValueError, match=message):
        attend_prefix(*change(case.q, *case.prefix), Scoring(1.0))


def test_missing_and_wrong_positions_are_refused():
    case = Case(torch.float32, 2, 2, 2, 16, 10, 4, 1, [0, 0])
    for scoring in (Scoring(1.0, window=Window(4)), Scoring(1.0, slopes=(1.0,) * 4)):
        with pytest.raises(ValueError, match="needs the positions of the new tokens"):
            attend_prefix(case.q, *case.prefix, scoring)
    with pytest.raises(ValueError, match=r"positions have shape \(3,\): expected \(2,\)"):
        attend_prefix(case.q, *case.prefix, Scoring(1.0), torch.tensor([10, 10, 10]))


def test_no_rows():
    case = Case(torch.float32, 1, 2, 2, 8, 4, 4, 1, [0])
    values, lse = attend_prefix(case.q[:0], *case.prefix, Scoring(1.0))
    assert values.shape == (0, 4, 1, 8)
    assert lse.shape == (0, 4, 1)
