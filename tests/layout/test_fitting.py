"""A refusal's advice is accepted by the check that refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.errors import CapacityError
from flexgen.layout.fitting import fitting_plan, largest_fitting, with_fitting_chunk
from flexgen.layout.limits import Limits
from flexgen.layout.needs import MemoryPlan, Need
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import LINKED, SHARED
from flexgen.layout.weight_slots import SlotSizes
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy, Split, Tier
from flexgen.schedule.turns import Turns
from flexgen.units import KIB, MIB
from flexgen.workload import Workload

LAYERS = {name: build_layers(open_model(name, weights="dummy")[0]) for name in ("demo", "opt-125m")}


def splits():
    return st.tuples(st.integers(0, 10), st.integers(0, 10)).map(
        lambda cut: Split(gpu=10 * min(cut), cpu=10 * abs(cut[0] - cut[1]), disk=100 - 10 * max(cut))
    )


POLICIES = st.builds(
    Policy,
    gpu_batch_size=st.one_of(st.integers(1, 70), st.just(10**9)),
    num_gpu_batches=st.one_of(st.integers(1, 9), st.just(10**9)),
    weights=splits(),
    cache=splits(),
    activations=splits(),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    sep_layer=st.booleans(),
)
ENTERING = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 70),
    num_gpu_batches=st.integers(1, 9),
    weights=splits(),
    cache=st.integers(0, 10).map(lambda tenths: Split(gpu=10 * tenths, cpu=100 - 10 * tenths)),
    activations=st.just(Split(gpu=100)),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    sep_layer=st.booleans(),
    prefill_rows=st.integers(1, 20),
)
LIMITS = st.one_of(st.none(), st.integers(10, 38).map(lambda bits: 2**bits))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    policy=POLICIES | ENTERING,
    workload=st.builds(Workload, st.integers(1, 300), st.integers(1, 40), st.integers(1, 20)),
    topology=st.sampled_from([LINKED, SHARED]),
    held=st.tuples(LIMITS, LIMITS, LIMITS),
    host=LIMITS,
)
def test_the_advice_is_accepted(name, policy, workload, topology, held, host):
    layers = LAYERS[name]
    placement = place_weights(layers, policy.weights, torch.float32)
    limits = Limits(zip(Tier, held, strict=True))
    limits.host = None if topology is SHARED else host

    def plan(asked):
        return plan_memory(layers, placement, asked, Target(topology), workload)

    try:
        fitting_plan(plan, policy, limits)
    except CapacityError as error:
        message = str(error)
    else:
        return
    _, would, advice = message.partition("It would fit with ")
    if not would:
        assert "At least " in message
        assert plan(policy.replace(gpu_batch_size=1, num_gpu_batches=1)).shortage(limits)
        return
    advised = {key: int(value) for key, value in re.findall(r"(\w+_batch\w*) = (\d+)", advice)}
    advised |= {
        key: {tier: 100} for key, tier in re.findall(r"(cache|activations) = { (\w+) = 100 }", advice)
    }
    assert {"gpu_batch_size", "num_gpu_batches"} <= advised.keys()
    assert not plan(policy.replace(**advised)).shortage(limits)


def plan_of(tier, what, role, each):
    """Needs that grow with the prompts in flight, and how often they were planned."""
    asked = []

    def plan(policy):
        asked.append(policy)
        return MemoryPlan(
            (Need(tier, what, role, each * policy.block_size),), SlotSizes(Turns(1, 1), (0,), (0,))
        )

    return plan, asked


def test_the_largest_shape_is_found_in_few_steps():
    plan, asked = plan_of(Tier.GPU, "cache", "home", KIB)
    found = largest_fitting(plan, Policy(num_gpu_batches=10**9), {Tier.GPU: 12_345 * KIB})
    assert found.num_gpu_batches == 12_345 and len(asked) < 120
    found = largest_fitting(plan, Policy(gpu_batch_size=10**9), {Tier.GPU: MIB})
    assert 512 < found.gpu_batch_size <= 1024


@pytest.mark.parametrize(
    ("tier", "what", "role", "advice"),
    [
        (Tier.DISK, "cache", "home", "offload_dir"),
        (Tier.GPU, "weights", "slots", "the needs without the homes of the weights exceed 1 KiB"),
        (Tier.GPU, "weights", "home", "larger share of the weights on a slower tier"),
    ],
)
def test_the_advice_is_about_what_is_short(tier, what, role, advice):
    plan, _ = plan_of(tier, what, role, 3 * KIB)
    with pytest.raises(CapacityError) as raised:
        fitting_plan(plan, Policy(gpu_batch_size=4), {tier: KIB})
    assert f"At least 3 KiB are needed on the {tier} tier" in str(raised.value)
    assert advice in str(raised.value)
    assert ("slower tier" in str(raised.value)) == ("slower tier" in advice)


def test_two_tiers_in_host_memory_are_held_against_it_together():
    needs = Need(Tier.GPU, "cache", "home", 3 * MIB), Need(Tier.CPU, "weights", "home", 2 * MIB)
    plan, limits = (
        MemoryPlan(needs, SlotSizes(Turns(1, 1), (0,), (0,))),
        Limits({Tier.GPU: 4 * MIB, Tier.CPU: 4 * MIB}),
    )
    assert plan.shortage(limits) == ""
    limits.host = 4 * MIB
    assert "needs 5 MiB on the gpu and cpu tiers together, which has 4 MiB" in plan.shortage(limits)


@pytest.mark.parametrize(
    ("limit", "chunk", "share"),
    [(500, 0, True), (140, 32, True), (90, 64, False), (60, 32, False), (10, 0, True)],
)
def test_a_prefix_is_not_shared_if_only_that_fits(limit, chunk, share):
    """Parts of prompts come first. The last limit is too small for anything: the policy stays, for the message."""

    def plan(policy):
        tokens = policy.prefill_chunk or 128
        nbytes = tokens + 100 * policy.share_prefix
        return MemoryPlan((Need(Tier.GPU, "cache", "slots", nbytes),), SlotSizes(Turns(3, 2), (), ()))

    limits = {Tier.GPU: limit, Tier.CPU: None, Tier.DISK: None}
    found = with_fitting_chunk(plan, Policy(), limits, 128)
    assert (found.prefill_chunk, found.share_prefix) == (chunk, share)


def test_the_larger_of_two_plans():
    """A call whose parts run one after another needs the larger of each two needs."""
    slots = SlotSizes(Turns(3, 2), (), ())
    one = MemoryPlan((Need(Tier.GPU, "cache", "home", 10), Need(Tier.CPU, "cache", "home", 7)), slots)
    other = MemoryPlan((Need(Tier.GPU, "cache", "home", 12), Need(Tier.CPU, "cache", "staging", 3)), slots)
    assert one.or_larger(other).by_tier == {Tier.GPU: 12, Tier.CPU: 10, Tier.DISK: 0}
    assert one.or_larger(one) == one
