"""Sizes of pages, and with them what the pages of a cache on disk that are being filled take of host memory."""

import pytest

from flexgen import Policy
from flexgen.layout.cache import cache_segments
from flexgen.layout.pieces import PieceSizes
from flexgen.layout.topology import LINKED
from flexgen.models import open_model
from flexgen.policy import Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.units import GIB, KIB, MIB
from flexgen.workload import Workload


@pytest.mark.parametrize(
    ("heads", "head_bytes", "tokens"),
    [
        (2 * 96 * 64, 256, 4),  # OPT-175B, 64 rows: 1 KiB of each head
        (2 * 96 * 64, 80, 13),  # in 4 bits
        (2 * 8, 256, 128),  # few heads: no more than 128 tokens, though they are less than 1 MiB
        (2 * 32, 256, 64),  # 1 MiB
        (2 * 96 * 64, 2048, 1),
    ],
)
def test_tokens_of_a_page_on_disk(heads, head_bytes, tokens):
    assert PieceSizes().tokens_on_disk(heads, head_bytes) == tokens


@pytest.mark.parametrize("new_tokens", [32, 64, 1024])
def test_a_page_does_not_grow_with_the_new_tokens(new_tokens):
    spec, _ = open_model("opt-175b", "dummy")
    shape, policy = spec.layers[0].attention.cache, Policy(cache={"disk": 100})
    (segment,) = cache_segments(shape, policy, 64, 256 + new_tokens, spec.dtype, LINKED)
    assert MIB < segment.page_bytes <= 64 * 96 * 2 * KIB


def test_the_papers_policy_fits_the_papers_machine():
    """OPT-175B, 8 batches of 64 prompts: of each, layer by layer, a page that is being filled is in host memory."""
    spec, _ = open_model("opt-175b", "dummy")
    policy = Policy(
        gpu_batch_size=64,
        num_gpu_batches=8,
        weights={"cpu": 50, "disk": 50},
        cache={"disk": 100},
        activations={"cpu": 100},
        attend_on="cpu",
    )
    machine = Hardware.preset("t4-paper")  # 16 GB, 208 GB and 1.5 TB
    plan = predict(spec, policy, machine, Workload(256, 32, 512), order="flexgen").plan
    pages = 96 * 8 * 64 * 96 * 2 * KIB
    staging = sum(n.nbytes for n in plan.needs if (n.tier, n.what, n.role) == (Tier.CPU, "cache", "staging"))
    assert pages <= staging < pages + 2 * GIB
    assert all(plan.on(t) <= machine.capacity[t] for t in Tier)
