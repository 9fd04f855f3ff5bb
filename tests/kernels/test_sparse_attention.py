"""Sparse attention against its definition in float64: what is chosen, what is summed, what is not read."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels import sparse_attention
from flexgen.kernels.attention import attend_in_torch
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.sparse_attention import Sparsity, attend_chosen, choose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GARBAGE = float("nan")

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case:
    """Random queries and a cache, cut into pages; scores of a size that leaves some tokens with a say."""

    def __init__(self, dtype, rows, kv_heads, group, dim, pages, length, starts=None, unused=0.0):
        generator = torch.Generator().manual_seed(rows * 1000 + dim)
        shape = (rows, kv_heads, sum(pages), dim)
        q, k, v = (
            torch.randn(s, generator=generator).to(dtype)
            for s in ((rows, kv_heads * group, 1, dim), shape, shape)
        )
        k[:, :, length:] = v[:, :, length:] = unused
        self.q, self.k, self.v, self.group = q, k, v, group
        self.pages = [
            (a.contiguous(), b.contiguous())
            for a, b in zip(k.split(pages, 2), v.split(pages, 2), strict=True)
        ]
        self.length = length
        self.starts = None if starts is None else torch.tensor([min(s, length - 1) for s in starts[:rows]])
        self.scale = 2 / math.sqrt(dim)
        self.arguments = q, self.pages, length, self.starts, Scoring(self.scale)

    def probabilities(self):
        """(rows, kv_heads, group, length) in float64: softmax over all tokens, the new one included."""
        rows, kv_heads, _, _ = self.k.shape
        q = self.q.double().view(rows, kv_heads, self.group, -1)
        scores = q @ self.k[:, :, : self.length].double().mT * self.scale
        if self.starts is not None:
            padding = torch.arange(self.length) < self.starts[:, None]
            scores.masked_fill_(padding[:, None, None], float("-inf"))
        return scores.softmax(-1)

    def tolerance(self, version):
        """How far a probability may be from that of float64, relatively."""
        if self.q.dtype is torch.float32:
            return 1e-4
        if version != "torch":
            return 1e-4 if version != "avx512_bf16" else 1e-3
        return 0.5  # scores of up to 10 in eight bits

    def check(self, choice, share, unit, version):
        """The chosen are blocks of the largest probabilities, in the right number, and the new token."""
        exact, cached, near = self.probabilities(), self.length - 1, 1 + self.tolerance(version)
        rows, kv_heads, most = choice.positions.shape
        assert most == Sparsity(share, unit).most(self.length)
        weights = choice.weights.view(rows, kv_heads, self.group, most)
        for row in range(rows):
            start = 0 if self.starts is None else int(self.starts[row])
            blocks = {}
            for t in range(start, cached):
                blocks.setdefault(t // unit, []).append(t)
            for head in range(kv_heads):
                mine = choice.positions[row, head].tolist()
                real = mine[: mine.index(cached)] if version != "torch" else [t for t in mine if t != cached]
                assert len(real) == len(set(real))
                taken = {t // unit for t in real}
                assert sorted(real) == sorted(t for block in taken for t in blocks[block])
                wanted = min(max(math.ceil(Fraction(repr(share)) * len(blocks)), 1), len(blocks))
                assert len(taken) == wanted, "a share of the blocks that hold a token of the row"
                value = {block: float(exact[row, head][:, tokens].sum()) for block, tokens in blocks.items()}
                least = min((value[block] for block in taken), default=0.0)
                left = max((value[block] for block in blocks.keys() - taken), default=0.0)
                assert left <= least * near, "a block that was left has more than one that was taken"
                # Each probability once; what fills up has none.
                dense = torch.zeros(self.group, self.length)
                there = choice.positions[row, head].expand(self.group, -1)
                dense.scatter_add_(1, there, weights[row, head])
                expected = torch.zeros(self.group, self.length, dtype=torch.float64)
                expected[:, [*real, cached]] = exact[row, head][:, [*real, cached]]
                torch.testing.assert_close(dense.double(), expected, rtol=self.tolerance(version), atol=1e-6)

    def expected(self, choice):
        """The values of the chosen tokens with exact probabilities, which are not made to sum up to one."""
        rows, kv_heads, _ = choice.positions.shape
        exact = self.probabilities()
        taken = torch.zeros(rows, kv_heads, self.length).scatter_(2, choice.positions, 1.0)
        exact = exact * taken[:, :, None]
        v = self.v[:, :, : self.length].double().nan_to_num()
        return (exact @ v).view(rows, kv_heads * self.group, 1, -1)


def of(version):
    """The two halves in a version."""
    kind = "in_torch" if version == "torch" else "natively"
    return tuple(getattr(sparse_attention, f"{name}_{kind}") for name in ("choose", "attend_chosen"))


def close(out, expected, version):
    if out.dtype is torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    else:
        atol = 0.1 if version == "torch" else 2e-3
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(out.dtype).eps, atol=atol)


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
    share=st.one_of(st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.999]), st.floats(0.001, 0.999)),
    unit=st.sampled_from([1, 1, 2, 5, 16, 64]),
)
def test_every_shape(version, dtype, rows, kv_heads, group, dim, pages, unused, starts, share, unit):
    length = sum(pages) - min(unused, pages[-1] - 1)
    case = Case(dtype, rows, kv_heads, group, dim, pages, length, starts)
    choose_so, attend_so = of(version)
    choice = choose_so(*case.arguments, Sparsity(share, unit))
    case.check(choice, share, unit, version)
    out = attend_so(choice, case.pages)
    assert out.dtype is dtype and out.shape == case.q.shape and out.is_contiguous()
    close(out, case.expected(choice), version)


@settings(relaxed, max_examples=8)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    group=st.sampled_from([1, 3, 8]),
    page=st.sampled_from([64, 1000, 4096]),
    length=st.integers(600, 2000),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 2999), min_size=5, max_size=5)),
    threads=st.integers(1, 5),
    unit=st.sampled_from([1, 32]),
)
def test_long_caches_on_several_threads(variant, dtype, rows, group, page, length, starts, threads, unit):
    torch.set_num_threads(threads)
    case = Case(dtype, rows, 2, group, 64, [page] * -(-length // page), length, starts)
    choose_so, attend_so = of(variant)
    choice = choose_so(*case.arguments, Sparsity(0.1, unit))
    case.check(choice, 0.1, unit, variant)
    close(attend_so(choice, case.pages), case.expected(choice), variant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1, 16])
def test_values_that_were_not_chosen_are_never_read(variant, dtype, unit):
    """Nor keys beyond the length or in the padding."""
    starts = [0, 3, 700]
    case = Case(dtype, 3, 2, 4, 64, [400, 400], 777, starts, GARBAGE)
    choose_so, attend_so = of(variant)
    choice = choose_so(*case.arguments, Sparsity(0.1, unit))
    expected = attend_so(choice, case.pages)
    close(expected, case.expected(choice), variant)
    for row, start in enumerate(starts):
        for n, (k, v) in enumerate(case.pages):
            k[row, :, : max(start - 400 * n, 0)] = GARBAGE
            for head in range(2):
                unread = torch.ones(400, dtype=torch.bool)
                mine = choice.positions[row, head] - 400 * n
                unread[mine[(mine >= 0) & (mine < 400)]] = False
                assert unread.sum() > 300
                v[row, head, unread] = GARBAGE
    again = choose_so(*case.arguments, Sparsity(0.1, unit))
    assert again.positions.equal(choice.positions) and again.weights.equal(choice.weights)
    assert attend_so(again, case.pages).equal(expected)


def test_with_one_query_head_to_each_it_is_the_choice_of_flexgen(version):
    """softmax over all, topk of the cached ones' weights, in addition to the new one's."""
    case = Case(torch.float32, 3, 4, 1, 64, [50, 50], 90)
    choose_so, attend_so = of(version)
    weights = case.probabilities()[:, :, 0]
    top = weights[..., :-1].topk(9)  # a tenth of 89, rounded up
    choice = choose_so(*case.arguments, Sparsity(0.1))
    assert choice.positions[..., :9].sort().values.equal(top.indices.sort().values)
    values = case.v.double().gather(2, top.indices[..., None].expand(-1, -1, -1, 64))
    expected = (top.values[..., None] * values).sum(2) + weights[..., -1:] * case.v[:, :, 89].double()
    close(attend_so(choice, case.pages), expected[:, :, None], version)


def test_query_heads_of_a_group_choose_together(version):
    """One head prefers token 0, the other token 1 a little less than both together prefer token 2."""
    k = torch.tensor([[4.0, 0.0], [0.0, 4.0], [3.9, 3.9], [0.0, 0.0]]).view(1, 1, 4, 2)
    q = torch.eye(2).view(1, 2, 1, 2)
    choose_so, _ = of(version)
    choice = choose_so(q, [(k, k.clone())], 4, None, Scoring(1.0), Sparsity(0.3))
    assert choice.positions.tolist() == [[[2, 3]]]
    exact = (q[0, :, 0] @ k[0, 0].T).softmax(-1)
    torch.testing.assert_close(choice.weights[0], exact[:, [2, 3]])


def test_all_but_nothing_is_dense(version):
    case = Case(torch.float32, 2, 2, 2, 32, [30, 30], 55, [0, 7])
    choose_so, attend_so = of(version)
    out = attend_so(choose_so(*case.arguments, Sparsity(0.9999)), case.pages)
    torch.testing.assert_close(out, attend_in_torch(*case.arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [1, 4])
def test_the_first_token_has_only_itself(version, unit):
    case = Case(torch.float32, 2, 2, 3, 16, [8], 1)
    choose_so, attend_so = of(version)
    choice = choose_so(*case.arguments, Sparsity(0.5, unit))
    assert choice.positions.tolist() == [[[0], [0]]] * 2 and choice.weights.eq(1).all()
    close(attend_so(choice, case.pages), case.v[:, :, :1].double().repeat_interleave(3, 1), version)


def test_equal_scores_are_no_reason_to_choose_twice_or_never(version):
    case = Case(torch.float32, 1, 2, 2, 16, [64], 41)
    case.pages[0][0].zero_()
    choose_so, _ = of(version)
    choice = choose_so(*case.arguments, Sparsity(0.25))
    for mine in choice.positions[0].tolist():
        assert len(set(mine)) == 11 and mine[-1] == 40
    torch.testing.assert_close(choice.weights, torch.full((1, 4, 11), 1 / 41))


def test_scores_of_any_size_do_not_overflow(version):
    case = Case(torch.float32, 1, 1, 2, 16, [64, 64], 100)
    case.q *= 1e4
    choose_so, attend_so = of(version)
    choice = choose_so(*case.arguments, Sparsity(0.1))
    close(attend_so(choice, case.pages), case.expected(choice), version)


def test_padding_is_not_chosen_before_what_has_become_zero(version):
    """The new token takes all, so that what is cached is as improbable as padding."""
    k = torch.zeros(1, 1, 61, 4)
    k[:, :, 60] = 100.0
    choice = of(version)[0](
        torch.full((1, 1, 1, 4), 10.0), [(k, k)], 61, torch.tensor([55]), Scoring(1.0), Sparsity(0.4)
    )
    assert sum(55 <= t < 60 for t in choice.positions.flatten().tolist()) == 2
    assert choice.weights.sum() == 1


def test_nan_stays_in_its_row(version):
    case = Case(torch.float32, 2, 1, 2, 16, [64], 50)
    case.pages[0][0][0, 0, 7] = GARBAGE
    choose_so, attend_so = of(version)
    out = attend_so(choose_so(*case.arguments, Sparsity(0.1)), case.pages)
    assert out[0].isnan().all() and not out[1].isnan().any()


def test_a_row_of_padding_only_is_zero(variant):
    case = Case(torch.float32, 2, 1, 1, 16, [8], 8)
    choose_so, attend_so = of(variant)
    choice = choose_so(case.q, case.pages, 8, torch.tensor([8, 0]), Scoring(1.0), Sparsity(0.5))
    out = attend_so(choice, case.pages)
    assert not out[0].any() and out[1].any()


def test_no_rows(version):
    case = Case(torch.float32, 1, 2, 2, 8, [4], 4)
    pages = [(k[:0], v[:0]) for k, v in case.pages]
    choose_so, attend_so = of(version)
    assert attend_so(choose_so(case.q[:0], pages, 4, None, Scoring(1.0), Sparsity(0.5)), pages).shape == (
        0,
        4,
        1,
        8,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_public_functions_take_what_fits(dtype):
    case = Case(dtype, 2, 2, 2, 32, [16, 16], 20, [0, 4])
    choice = choose(*case.arguments, Sparsity(0.5))
    out = attend_chosen(choice, case.pages)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), case.expected(choice), rtol=0, atol=0.1)


def test_what_does_not_fit_is_refused():
    case = Case(torch.float32, 1, 2, 2, 8, [4], 4)
    with pytest.raises(ValueError, match="length 5, but the pages have 4 tokens"):
        choose(case.q, case.pages, 5, None, Scoring(1.0), Sparsity(0.5))
    with pytest.raises(ValueError, match="a multiple of 2 heads"):
        choose(case.q[:, :3], case.pages, 4, None, Scoring(1.0), Sparsity(0.5))


@pytest.mark.parametrize("starts", [[-1, 0], [0]])
def test_starts_that_do_not_fit_are_refused(variant, starts):
    case = Case(torch.float32, 2, 2, 2, 8, [4], 4)
    with pytest.raises(ValueError, match="starts must be 2 integers of at least 0"):
        sparse_attention.choose_natively(
            case.q, case.pages, 4, torch.tensor(starts), Scoring(1.0), Sparsity(0.5)
        )


@given(share=st.integers(1, 1000), count=st.integers(0, 5000))
def test_kept_is_the_exact_ceiling_of_a_decimal_share(share, count):
    exact = min(max(math.ceil(Fraction(share, 1000) * count), 1), count)
    assert Sparsity(share / 1000).chosen_blocks(count) == exact
