"""Models whose layers differ: each has its own times and bytes, in predictions, linear programs and searches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.errors import CapacityError
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import LINKED
from flexgen.layout.weight_slots import slot_sizes
from flexgen.models import build_layers
from flexgen.models.families import spec_from_config
from flexgen.policy import Policy, Split, Tier
from flexgen.predict.arithmetic import alike_layers
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict
from flexgen.predict.workspaces import workspaces_on
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op
from flexgen.search.corners import Corners
from flexgen.search.find import find_policy
from flexgen.search.linear import CLASSES, Column, shares_of
from flexgen.workload import Workload

KINDS = "wide", "narrow", "post-norm", "other rope"
PLAIN = tuple(Column(what, tier) for what in CLASSES for tier in (Tier.CPU, Tier.GPU, Tier.DISK))


def spec_of(uneven, kinds):
    """Wider than the tests of ids need: layers are larger than the blocks and rows that are the same for all."""
    spec = spec_from_config(uneven.UnevenConfig(kinds), "uneven")

    def wide(layer):
        own, mlp = layer.attention, layer.mlp
        return replace(
            layer, attention=replace(own, head_dim=4 * own.head_dim), mlp=replace(mlp, size=8 * mlp.size)
        )

    return replace(spec, hidden_size=128, embed_size=128, layers=tuple(map(wide, spec.layers)))


def test_each_layer_takes_its_own_time(uneven, machine):
    """Products and attention of the prompt and of a token, by hand, for two layers of unlike shapes."""
    spec = spec_from_config(uneven.UnevenConfig(("wide", "narrow", "wide")), "uneven")
    policy = Policy(gpu_batch_size=2)
    trace = predict(spec, policy, machine(), Workload(6, 4, 2)).trace()
    took = {(e.step.token, e.step.layer): e.end - e.start for e in trace.events if e.step.op is Op.COMPUTE}
    # Weights of each unit: attention and MLP of 4 heads of 16 (2 for keys) and 3 x 48; of 2 of 4 (1) and 2 x 160.
    sizes = [32 * (2 * 64 + 2 * 32), 32 * 3 * 48, 32 * (2 * 8 + 2 * 4), 32 * 2 * 160]
    keys, queries = [32, 0, 4, 0], [64, 0, 8, 0]
    for unit, (size, kv, q) in enumerate(zip(sizes, keys, queries, strict=True), 1):
        prompt = 1e-4 + 2 * 12 * size / 1e9 + 4 * 2 * 21 * q / 1e9
        assert took[0, unit] == pytest.approx(prompt, rel=1e-6), unit
        token = 1e-4 + 2 * 2 * size / 0.25e9 + 2 * 2 * 9 * kv * 4 / 1e8
        assert took[3, unit] == pytest.approx(token, rel=1e-6), unit
    for token in (0, 3):
        assert took[token, 5] == pytest.approx(took[token, 1])  # the third layer is like the first
        assert len({round(took[token, unit], 12) for unit in (1, 2, 3, 4)}) == 4


def test_weights_and_cache_of_each_layer_travel_in_their_own_sizes(uneven, machine):
    spec = spec_from_config(uneven.UnevenConfig(("wide", "narrow", "wide")), "uneven")
    policy = Policy(
        gpu_batch_size=2, weights={"cpu": 100}, cache={"cpu": 100}, attend_on="gpu", sep_layer=False
    )
    trace = predict(spec, policy, machine(), Workload(6, 4, 2)).trace()
    loads = {
        op: [e.end - e.start for e in trace.events if e.step[:2] == (op, 2) and e.step.layer in (1, 2, 3)]
        for op in (Op.LOAD_WEIGHTS, Op.LOAD_CACHE)
    }
    assert [len(times) for times in loads.values()] == [3, 3]
    wide = 2 * 32 * (64 + 32) + 3 * 32 * 48 + 2 * 32
    narrow = 2 * 32 * (8 + 4) + 8 + 2 * 4 + 2 * 32 * 160 + 160 + 32 + 3 * 32
    expected = [1e-5 + 4 * size / 1e6 for size in (wide, narrow, wide)]
    assert loads[Op.LOAD_WEIGHTS] == pytest.approx(expected, rel=0.03)  # each weight is aligned
    # A page of 2 rows for 10 tokens, in whole disk blocks: 5120 bytes for 2 heads of 16, and 640 for one of 4.
    assert loads[Op.LOAD_CACHE] == pytest.approx([1e-5 + size / 1e6 for size in (8192, 4096, 8192)])


def test_layers_with_equal_shapes_are_alike_only_if_their_specs_are(uneven):
    spec = spec_from_config(uneven.UnevenConfig(("wide", "other rope", "wide", "narrow")), "uneven")
    for sep_layer, expected in ((False, [0, 1, 2, 1, 4, 5]), (True, [0, 1, 2, 3, 4, 1, 2, 7, 8, 9])):
        layers = build_layers(spec, sep_layer)
        assert alike_layers(layers, place_weights(layers, Split(cpu=100), torch.float32), False) == expected


KIND_LISTS = st.lists(st.sampled_from(KINDS), min_size=1, max_size=14)


@settings(max_examples=60)
@given(
    kinds=KIND_LISTS,
    at=st.tuples(*[st.sampled_from([Tier.GPU, Tier.CPU, Tier.DISK])] * 3),
    batches=st.integers(1, 4),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    sep_layer=st.booleans(),
)
def test_corners_are_the_plan_of_the_whole_model(
    kinds, at, batches, attend_on, order, sep_layer, uneven, machine
):
    """Bytes come from a few of the layers; homes and slots must be those of all of them."""
    spec = spec_of(uneven, kinds)
    splits = {what: {tier: 100} for what, tier in zip(CLASSES, at, strict=True)}
    policy = Policy(
        gpu_batch_size=3, num_gpu_batches=batches, attend_on=attend_on, sep_layer=sep_layer, **splits
    )
    workload = Workload(20, 8, 3 * batches)
    corners = Corners(Job(spec, machine(), workload, torch.float32, order))
    # Where only one column is asked for, nothing is put together from several corners.
    columns = [Column(what, tier) for what, tier in zip(CLASSES, at, strict=True)]
    nbytes = corners.figures(policy, columns).at(shares_of(policy))[-3:]
    layers, slots = build_layers(spec, sep_layer), corners.order(policy).slots
    placement = place_weights(layers, policy.weights, torch.float32)
    target = Target(LINKED, slots, workspaces_on(machine()))
    plan = plan_memory(layers, placement, policy, target, workload)
    whole, between = plan.weight_slots, slot_sizes(layers, placement, LINKED, slots.weights, False)
    ends = {
        Tier.GPU: sum(whole.device) - sum(between.device),
        Tier.CPU: sum(whole.staging) - sum(between.staging),
    }
    assert list(nbytes) == pytest.approx([plan.on(tier) - ends.get(tier, 0) for tier in Tier])


@settings(max_examples=30)
@given(
    kinds=KIND_LISTS,
    one=st.sampled_from(PLAIN),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    sep_layer=st.booleans(),
    gen_len=st.integers(1, 9),
)
def test_lanes_of_a_corner_are_the_predictions(kinds, one, attend_on, sep_layer, gen_len, uneven, machine):
    """Each kind of layer counts as often as the model has it."""
    spec, cpu = spec_of(uneven, kinds), {what: {"cpu": 100} for what in CLASSES}
    form = Policy(gpu_batch_size=3, num_gpu_batches=3, attend_on=attend_on, sep_layer=sep_layer, **cpu)
    policy, workload = form.replace(**{one.what: {one.tier: 100}}), Workload(20, gen_len, 9)
    drawn = Corners(Job(spec, machine(), workload, torch.float32)).figures(form, PLAIN)
    report = predict(spec, policy, machine(), workload).report
    for (phase, lanes), seconds in zip(report.phases.items(), drawn.seconds(shares_of(policy)), strict=False):
        for lane, taken in lanes.items():
            # Weights come in other pieces, each with its fixed seconds, and pages of a cache in whole ones.
            assert seconds[lane] == pytest.approx(taken, rel=0.15, abs=2e-3), (phase, lane)


@pytest.mark.slow
def test_a_search_of_an_uneven_model_is_a_policy_that_fits(uneven, machine):
    spec = spec_of(uneven, [KINDS[n % 3] for n in range(30)])
    room = {"gpu": 3 << 20, "cpu": 40 << 20, "disk": 1 << 30}
    found = find_policy(spec, machine(capacity=room), Workload(40, 8, 16))
    best = found.best
    assert all(best.prediction.plan.on(tier) <= room[str(tier)] for tier in Tier)
    # Others, by the same prediction: none is faster by more than the last steps of the search.
    fits = 0
    for weights, cache in itertools.product(({"cpu": 100}, {"gpu": 5, "cpu": 95}, {"disk": 100}), repeat=2):
        other = best.policy.replace(weights=weights, cache=cache)
        try:
            took = predict(spec, other, machine(capacity=room), Workload(40, 8, 16)).report.total_s
        except CapacityError:
            continue
        fits += 1
        assert best.prediction.report.total_s <= 1.02 * took
    assert fits == 3
