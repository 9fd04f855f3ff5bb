"""What a call shares, and the home of its prefix."""

import pytest

from flexgen import Policy
from flexgen.layout.passes import Passes
from flexgen.layout.prefix import prefix_home, prefix_policy, prefix_slots, shared_tokens
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
        (Workload(100, 8, 1, 60), Policy(), 0),
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
