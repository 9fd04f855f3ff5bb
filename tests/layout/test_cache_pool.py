"""The pages that batches share: their bytes, and which batches they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import PolicyError
from flexgen.layout.cache_pool import cache_pool
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory, room_sizes
from flexgen.layout.topology import LINKED, SHARED
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy, Tier
from flexgen.workload import Workload

SPEC, _ = open_model("opt-125m", weights="dummy")
LAYERS = build_layers(SPEC)
TOKEN = 2 * SPEC.num_layers * SPEC.hidden_size * 2
"""Bytes of one token of one row in float16."""
WORKLOAD = Workload(100, 900, 64)


def asked(**fields):
    return Policy(**dict(gpu_batch_size=8, num_gpu_batches=4, cache={"cpu": 100}, reserve_new=100) | fields)


def pool_of(policy, workload=WORKLOAD, topology=SHARED):
    sizes = room_sizes(policy, workload.num_prompts, workload.gen_len)
    return cache_pool(LAYERS, policy, sizes, workload, torch.float16, topology)


def test_a_pool_has_the_reserved_tokens_and_one_long_batch():
    """1000 tokens are 8 pages of 125; 200 are 2 of them."""
    assert pool_of(asked()).nbytes == {Tier.CPU: (3 * 250 + 1000) * 8 * TOKEN}
    assert pool_of(asked(num_gpu_batches=1)).nbytes == {Tier.CPU: 1000 * 8 * TOKEN}
    assert pool_of(asked(reserve_new=0)) is None
    assert pool_of(asked(reserve_new=900)) is None, "it reserves all"


@pytest.mark.parametrize(
    ("policy", "topology", "tiers"),
    [
        (asked(cache={"gpu": 50, "cpu": 50}), SHARED, {Tier.GPU, Tier.CPU}),
        (asked(cache={"gpu": 50, "cpu": 50}), LINKED, {Tier.CPU}),
        (asked(attend_on="gpu"), LINKED, set()),
        (asked(cache={"disk": 100}), SHARED, set()),
    ],
)
def test_memory_in_which_attention_reads_grows(policy, topology, tiers):
    assert set(pool_of(policy, topology=topology).nbytes) == tiers


def test_which_batches_fit():
    pool = pool_of(asked())
    assert pool.fits([(8, 1000), (8, 250), (8, 250), (8, 250)])
    assert not pool.fits([(8, 1000), (8, 250), (8, 250), (8, 251)])
    assert pool.fits([(8, 1000), (4, 500), (4, 500), (4, 500)])
    assert pool.fits([])


@given(
    rows=st.integers(1, 8),
    batches=st.integers(1, 4),
    reserve=st.integers(1, 899),
    cpu=st.integers(0, 100),
    topology=st.sampled_from([SHARED, LINKED]),
)
def test_a_pool_is_never_larger_than_the_whole_cache(rows, batches, reserve, cpu, topology):
    policy = asked(
        gpu_batch_size=rows,
        num_gpu_batches=batches,
        reserve_new=reserve,
        cache={"cpu": cpu, "disk": 100 - cpu},
    )
    whole, pool = plan(policy.replace(reserve_new=0), topology), plan(policy, topology)
    for tier in Tier:
        assert homes(pool, tier) <= homes(whole, tier)
    assert pool_of(policy, topology=topology).fits([(rows, 1000)])


def plan(policy, topology):
    target = Target(topology)
    return plan_memory(LAYERS, place_weights(LAYERS, policy.weights, torch.float16), policy, target, WORKLOAD)


def homes(plan, tier):
    return sum(n.nbytes for n in plan.needs if (n.tier, n.what, n.role) == (tier, "cache", "home"))


def test_a_plan_counts_the_pool():
    assert homes(plan(asked(), SHARED), Tier.CPU) == pool_of(asked()).nbytes[Tier.CPU]
    assert homes(plan(asked(reserve_new=0), SHARED), Tier.CPU) == 4 * 1000 * 8 * TOKEN


def test_keys_that_change_with_the_length_cannot_be_computed_again(monkeypatch):
    monkeypatch.setattr(type(SPEC), "stretches", lambda self, length: length > 999)
    assert plan(asked(reserve_new=0), SHARED)
    with pytest.raises(
        PolicyError,
        match="reserve_new is 100 for texts of 1000 tokens, but the keys of .* set reserve_new to 0 or",
    ):
        plan(asked(), SHARED)
    short = replace(WORKLOAD, gen_len=100)
    assert room_sizes(asked(), 20, 100) == [8, 8, 4] and room_sizes(asked(), 20, 101) == [8, 8, 8]
    assert not asked().reserves(short.gen_len)
