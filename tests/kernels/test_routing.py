"""The choices of a router and the sums of the experts' outputs, against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.loading import native, native_available
from flexgen.kernels.routing import (
    ROWS,
    Routed,
    RouterForm,
    by_expert,
    expert_sum,
    expert_sum_in_torch,
    route_natively,
    routes_natively,
)
from flexgen.kernels.rows import gather_rows
from flexgen.kernels.tape import record, replay

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_route(logits: torch.Tensor, correction: torch.Tensor | None, form: RouterForm) -> Routed:
    """The definition, in float64."""
    chosen, factors = [], []
    for row in logits.double():

        def scored(values: torch.Tensor) -> torch.Tensor:
            return values.sigmoid() if form.sigmoid else values.softmax(-1)

        scores = scored(row) if form.scores_all else row
        offered = scores if correction is None else scores + correction
        best = sorted(range(len(row)), key=lambda n: (-offered[n].item(), n))[: form.top_k]
        own = scores[best] if form.scores_all else scored(scores[best])
        if form.normalised:
            own = own / max(own.sum().item(), form.least_sum)
        chosen.append(best)
        factors.append((own * form.scale).float())
    return by_expert(torch.tensor(chosen), torch.stack(factors), logits.shape[1])


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 9),
    sigmoid=st.booleans(),
    scores_all=st.booleans(),
    normalised=st.booleans(),
    corrected=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_router_chooses_the_experts_with_the_best_scores(
    variant, dtype, rows, experts, top_k, sigmoid, scores_all, normalised, corrected, seed
):
    generator = torch.Generator().manual_seed(seed)
    # All logits and sums with a correction differ, so that rounding changes no choice.
    logits = torch.stack([torch.randperm(experts, generator=generator) for _ in range(rows)])
    logits = (logits / 8).to(dtype)
    correction = torch.randperm(experts, generator=generator) * 2.0 if corrected else None
    form = RouterForm(min(top_k, experts), sigmoid, scores_all, normalised, 1e-20, 1.5)
    before = native.variant()
    native.set_variant(variant)
    try:
        found = route_natively(logits, correction, form)
    finally:
        native.set_variant(before)
    expected = expected_route(logits, correction, form)
    assert found.tokens.equal(expected.tokens) and found.places.equal(expected.places)
    assert found.ends.equal(expected.ends)
    torch.testing.assert_close(found.factors, expected.factors, rtol=1e-5, atol=1e-7)


@needs_kernel
def test_equal_scores_choose_the_first_experts(variant):
    found = route_natively(torch.zeros(2, 20), None, RouterForm(3))
    assert found.ends.tolist() == [2, 4] + [6] * 18 and found.places.tolist() == [[0, 2, 4], [1, 3, 5]]
    torch.testing.assert_close(found.factors, torch.full((6,), 1 / 20))


@needs_kernel
def test_scores_that_vanish_give_factors_of_zero(variant):
    form = RouterForm(2, sigmoid=True, normalised=True, least_sum=1e-20)
    assert route_natively(torch.full((1, 5), -1e30), None, form).factors.tolist() == [0.0, 0.0]


@needs_kernel
def test_nan_logits_choose_experts_and_give_nan(variant):
    found = route_natively(torch.full((1, 5), math.nan), None, RouterForm(3))
    assert found.factors.isnan().all() and found.ends[-1] == 3


def test_the_order_of_the_experts_in_torch():
    chosen = torch.tensor([[4, 0], [2, 4]])
    routed = by_expert(chosen, torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 5)
    assert routed.tokens.tolist() == [0, 1, 0, 1] and routed.ends.tolist() == [1, 1, 2, 2, 4]
    assert routed.places.tolist() == [[2, 0], [1, 3]]
    assert routed.factors.tolist() == torch.tensor([0.2, 0.3, 0.1, 0.4]).tolist()


@pytest.mark.parametrize("size", [7, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_the_outputs_of_each_token(version, dtype, size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(5)])
    routed = by_expert(chosen, torch.rand(5, 3, generator=generator), 6)
    x = torch.randn(15, size, generator=generator).to(dtype)
    exact = (x.double() * routed.factors[:, None].double())[routed.places].sum(dim=1)
    sums = expert_sum_in_torch if version == "torch" else expert_sum
    wide = sums(x, routed, torch.float32)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-6)
    assert sums(x, routed, dtype).equal(wide.to(dtype))


@needs_kernel
def test_other_tokens_and_devices_are_routed_in_torch():
    assert routes_natively(torch.zeros(ROWS, 8))
    assert not routes_natively(torch.zeros(ROWS + 1, 8))
    assert not routes_natively(torch.zeros(2, 8, device="meta"))
    assert not routes_natively(torch.zeros(2, 8, dtype=torch.float64))
    assert not routes_natively(torch.zeros(8, 2).t())


@needs_kernel
def test_a_tape_routes_the_tokens_of_each_replay():
    """The choices differ from those of the recorded tokens."""
    logits, x = torch.randn(4, 16).bfloat16(), torch.randn(4, 32).bfloat16()

    def work():
        routed = route_natively(logits, None, RouterForm(3))
        return expert_sum(gather_rows(x, routed.tokens), routed, torch.bfloat16)

    y, tape = record(work)
    assert tape is not None
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits.copy_(torch.randn(4, 16, generator=generator))
        x.copy_(torch.randn(4, 32, generator=generator))
        replay([tape], 0)
        assert y.equal(work())
