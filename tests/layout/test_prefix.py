"""What a call shares, and the home of its prefix."""

import pytest

from flexgen import Policy
from flexgen.layout.passes import Passes
from flexgen.layout.prefix import (
    prefix_home,
    prefix_policy,
    prefix_slots,
    prefix_workloads,
    shared_tokens,
    sharing,
)
from flexgen.models import open_model
from flexgen.policy import Split, Tier
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

JOB = Workload(prompt_len=100, gen_len=8, num_prompts=20, prefix=60)


@pytest.mark.parametrize(
    ("workload", "policy", "tokens"),
    [
        (JOB, Policy(), 60),
        (JOB, Policy(share_prefix=False), 0),
        (JOB, Policy(attn_sparsity=0.5), 0),
        (Workload(100, 8, 20, 31), Policy(), 0),
        (Workload(100, 8, 20, 32), Policy(), 32),
        (Workload(100, 8, 20, 99), Policy(), 99),
    ],
)
def test_what_is_shared(workload, policy, tokens):
    assert shared_tokens(workload, policy) == tokens
    passes = Passes.of(workload, policy)
    assert (passes.width, passes.shared) == (100 - tokens, tokens)


@pytest.mark.parametrize(
    ("cache", "rows", "home"),
    [
        ({"gpu": 100}, 1, Tier.GPU),
        ({"gpu": 10, "cpu": 90}, 20, Tier.GPU),
        ({"gpu": 10, "cpu": 90}, 4, Tier.CPU),  # no row of a batch is on the GPU
        ({"cpu": 100}, 4, Tier.CPU),
        ({"disk": 100}, 4, Tier.DISK),
        ({"cpu": 50, "disk": 50}, 4, Tier.CPU),
        ({"gpu": {"percent": 50, "codec": "int4"}, "cpu": 50}, 8, Tier.CPU),  # larger than four encoded rows
        ({"gpu": {"percent": 50, "codec": "int4"}, "cpu": 50}, 16, Tier.GPU),
        ({"disk": {"percent": 100, "codec": "int8"}}, 2, Tier.DISK),
    ],
)
def test_a_prefix_is_where_it_saves_memory(cache, rows, home):
    policy = Policy(gpu_batch_size=rows, num_gpu_batches=3, cache=cache, attend_on="cpu")
    assert prefix_home(policy) is home
    one = prefix_policy(policy)
    assert (one.block_size, one.cache, one.attend_on) == (1, Split(**{home: 100}), "gpu")


def test_cell_slots_serve_as_slots_of_the_prefix():
    assert prefix_slots(Slots(weights=3, cells=2)) == Slots(weights=3, cells=3)
    assert prefix_slots(Slots(weights=1, cells=2)) == Slots(weights=1, cells=2)


def test_one_prompt_shares_nothing(configs):
    spec, _ = open_model(configs["opt"], "dummy")
    assert sharing(spec, Workload(40, 4, 1, prefix=35, cuts=(33,))) == Workload(40, 4, 1)
    assert sharing(spec, Workload(40, 4, 2, prefix=35)).prefix == 35


def test_each_part_is_computed_after_the_parts_before_it():
    job = Workload(300, 8, 20, prefix=200, cuts=(20, 50, 120))
    assert prefix_workloads(job, Policy()) == (
        Workload(50, 1, 1),  # 20 tokens are too few
        Workload(120, 1, 1, prefix=50),
        Workload(200, 1, 1, prefix=120, cuts=(50,)),
    )
    assert prefix_workloads(job, Policy(share_prefix=False)) == ()
    assert prefix_workloads(JOB, Policy()) == (Workload(60, 1, 1),)
