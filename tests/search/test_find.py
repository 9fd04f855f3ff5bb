"""The search: its linear program against the plan and the cost model, its choice against every policy of a grid."""

import contextlib
import gc
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from flexgen import Auto, Policy
from flexgen.errors import CapacityError, HardwareError, PolicyError, RequestError, ScheduleError
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import LINKED
from flexgen.layout.weight_slots import slot_sizes
from flexgen.models import build_layers, open_model
from flexgen.policy import Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict
from flexgen.predict.workspaces import workspaces_on
from flexgen.quant import CODECS
from flexgen.quant.groupwise import RoundedGroupwise
from flexgen.schedule.orders import ORDERS
from flexgen.search.choices import Choices
from flexgen.search.corners import Corners
from flexgen.search.effort import QUICK
from flexgen.search.find import find_for_job, find_policy
from flexgen.search.linear import CLASSES, Column, one_codec_each, shares_of, solve
from flexgen.units import MIB
from flexgen.workload import Workload

PLAIN = tuple(Column(what, tier) for what in CLASSES for tier in (Tier.CPU, Tier.GPU, Tier.DISK))


@pytest.fixture(scope="module")
def opt(configs):
    """216 MiB, 48 of them a layer: large compared with buffers that are the same for any model."""
    spec, _ = open_model(configs["opt"], "dummy")
    layer = spec.layers[0]
    wide = replace(
        layer,
        attention=replace(layer.attention, heads=16, kv_heads=16, head_dim=64),
        mlp=replace(layer.mlp, size=4096),
    )
    sizes = dict(hidden_size=1024, embed_size=1024, vocab_size=4096, max_positions=2048)
    return replace(spec, layers=(wide,) * 4, **sizes)


def small(machine, gpu, cpu="400MiB", disk="4GiB", **changes):
    return machine(capacity={"gpu": gpu, "cpu": cpu, "disk": disk}, **changes)


ALL_OPEN = Auto()


def quickly(spec, hardware, workload, auto=ALL_OPEN, order=None):
    """`find_policy` with less effort, for what holds of any search."""
    return find_for_job(Job.checked(spec, hardware, workload, order=order), auto, effort=QUICK)


def took(spec, policy, hardware, workload, **asked):
    return predict(spec, policy, hardware, workload, **asked).report.total_s


def corner(what, tier):
    return {what: {tier: 100}}


@settings(max_examples=40)
@given(
    at=st.tuples(*[st.sampled_from([Tier.GPU, Tier.CPU, Tier.DISK])] * 3),
    size=st.integers(1, 6),
    batches=st.integers(1, 9),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    overlap=st.booleans(),
)
def test_corners_are_the_plan_of_the_whole_model(at, size, batches, attend_on, overlap, opt, machine):
    """Bytes are drawn out from models of one and two layers and from few batches, and put together from one class
    at a time: homes must come out as in the plan, and buffers for what moves are never forgotten."""
    splits = {what: {tier: 100} for what, tier in zip(CLASSES, at, strict=True)}
    cpu = {what: {"cpu": 100} for what in CLASSES}
    form = Policy(gpu_batch_size=size, num_gpu_batches=batches, attend_on=attend_on, overlap=overlap, **cpu)
    policy, workload = form.replace(**splits), Workload(20, 8, size * batches)
    corners = Corners(Job(opt, machine(), workload, torch.float32))
    nbytes = corners.figures(form, PLAIN).at(shares_of(policy))[-3:]
    layers = build_layers(opt, policy.sep_layer)
    slots = corners.order(form).slots
    placement = place_weights(layers, policy.weights, torch.float32)
    target = Target(LINKED, slots, workspaces_on(machine()))
    plan = plan_memory(layers, placement, policy, target, workload)
    homes = sum(n.nbytes for n in plan.needs if n.role == "home")
    buffers = sum(n.nbytes for n in plan.needs if n.role != "home")
    assert sum(nbytes) == pytest.approx(homes + buffers, abs=0.5 * buffers + 1)
    if policy == form:  # all but the slots of the embedding and the head, which corners leave out
        whole, between = plan.weight_slots, slot_sizes(layers, placement, LINKED, slots.weights, False)
        ends = {
            Tier.GPU: sum(whole.device) - sum(between.device),
            Tier.CPU: sum(whole.staging) - sum(between.staging),
        }
        assert list(nbytes) == pytest.approx([plan.on(tier) - ends.get(tier, 0) for tier in Tier])


@settings(max_examples=30)
@given(
    size=st.integers(1, 5),
    batches=st.integers(2, 7),
    one=st.sampled_from(PLAIN),
    gen_len=st.integers(1, 12),
    attend_on=st.sampled_from(["cpu", "gpu"]),
)
def test_lanes_of_a_corner_are_the_predictions(size, batches, one, gen_len, attend_on, opt, machine):
    cpu = {what: {"cpu": 100} for what in CLASSES}
    form = Policy(gpu_batch_size=size, num_gpu_batches=batches, attend_on=attend_on, **cpu)
    policy, workload = form.replace(**corner(one.what, one.tier)), Workload(20, gen_len, size * batches)
    seconds = Corners(Job(opt, machine(), workload, torch.float32)).figures(form, PLAIN)
    report = predict(opt, policy, machine(), workload).report
    for (phase, lanes), drawn in zip(report.phases.items(), seconds.seconds(shares_of(policy)), strict=False):
        for lane, taken in lanes.items():
            # Weights come in other pieces, each with its fixed seconds, and pages of a cache in whole ones.
            assert drawn[lane] == pytest.approx(taken, rel=0.15, abs=2e-3), (phase, lane)


@settings(max_examples=6)
@given(
    gpu=st.integers(40, 300),
    cpu=st.integers(30, 300),
    prompts=st.sampled_from([1, 5, 8]),
    lossy=st.booleans(),
    attend_on=st.sampled_from(["cpu", "gpu"]),
)
def test_what_is_found_fits_and_sums_to_a_whole(gpu, cpu, prompts, lossy, attend_on, opt, machine):
    hardware = small(machine, gpu * MIB, cpu * MIB)
    workload = Workload(100, 6, prompts)
    try:
        found = quickly(opt, hardware, workload, Auto({"attend_on": attend_on}, lossy))
    except CapacityError:
        smallest = Policy(weights={"disk": 100}, cache={"disk": 100}, activations={"disk": 100}, overlap=False,
                          attend_on=attend_on)  # fmt: skip
        with pytest.raises(CapacityError):
            predict(opt, smallest, hardware, workload)
        return
    for candidate in (found.best, *found.runners_up):
        plan = candidate.prediction.plan  # `predict` would have refused it
        assert all(plan.on(tier) <= hardware.capacity[tier] for tier in Tier)
        assert candidate.policy.attend_on == attend_on
        assert candidate.policy.attn_sparsity == 1
        codecs = {getattr(candidate.policy, w)[t].codec for w in CLASSES for t in Tier}
        assert lossy or codecs == {"none"}
        assert candidate.limits and candidate.tokens_s <= found.best.tokens_s


GRID = [{"gpu": a, "cpu": b, "disk": 100 - a - b} for a in range(0, 101, 50) for b in range(0, 101 - a, 50)]


@pytest.mark.parametrize(
    ("gpu", "cpu", "changes"),
    [
        ("270MiB", "160MiB", {"fixed": {}}),
        ("150MiB", "260MiB", {"fixed": {"cell": 1.0, "disk_job": 0.5}, "host_attention": {"float32": 1e6}}),
    ],
)
def test_no_policy_of_a_grid_is_faster(gpu, cpu, changes, opt, machine):
    """Both by the same prediction. 2%: percentages of the search are whole, its last steps are of 1%."""
    hardware, workload = small(machine, gpu, cpu, **changes), Workload(100, 5, 8)
    found = find_policy(opt, hardware, workload)
    shapes = (1, 8), (2, 4), (4, 1), (8, 1)
    least, fits = np.inf, 0
    for (size, batches), weights, cache, hidden in itertools.product(
        shapes, GRID, GRID, GRID[::5] + GRID[2:3]
    ):
        policy = Policy(gpu_batch_size=size, num_gpu_batches=batches, weights=weights, cache=cache,
                        activations=hidden, attend_on="gpu" if size == 2 else "cpu")  # fmt: skip
        try:
            least = min(least, took(opt, policy, hardware, workload))
        except CapacityError:
            continue
        fits += 1
    assert fits > 20
    best = found.best
    assert took(opt, best.policy, hardware, workload, order=best.order) <= 1.02 * least


@pytest.mark.parametrize("capacity", ["330MiB", "350MiB", "400MiB"])
def test_a_head_that_is_larger_than_the_layers(capacity, opt, host):
    """It takes a slot, or a large part of the memory in place of one: what fits is no line between the corners."""
    spec, job = replace(opt, vocab_size=60_000), Workload(16, 8, 8)
    rates = {"disk_read": 1.2e8, "disk_write": 1e8, "host": 1e9}
    hardware = host(capacity={"cpu": capacity, "disk": "8GiB"}, bandwidth=rates)
    best = find_policy(spec, hardware, job).best
    cpu = {what: {"cpu": 100} for what in CLASSES}
    by_hand = []
    for percent, overlap in itertools.product(range(0, 101, 10), (True, False)):
        weights = {"cpu": percent, "disk": 100 - percent}
        policy = Policy(gpu_batch_size=8, overlap=overlap, **cpu | {"weights": weights})
        with contextlib.suppress(CapacityError):
            by_hand.append(took(spec, policy, hardware, job))
    assert 4 < len(by_hand) < 22
    assert best.prediction.report.total_s <= 1.02 * min(by_hand)


def test_the_program_by_hand(opt, machine):
    """If only part of the weights fits the GPU, it is filled, and the rest comes over the link."""
    rates = dict.fromkeys(("to_device", "from_device", "disk_read", "disk_write", "host"), 1e15)
    hardware = machine(
        capacity={"gpu": 10**9, "cpu": 10**9, "disk": 10**9}, bandwidth=rates | {"to_device": 1e6}, fixed={}
    )
    cpu = {what: {"cpu": 100} for what in CLASSES}
    corners = Corners(Job(opt, hardware, Workload(4, 4, 4), torch.float32))
    figures = corners.figures(Policy(gpu_batch_size=4, **cpu), PLAIN)
    on_gpu, on_cpu = ({Column("weights", tier): 1.0} for tier in (Tier.GPU, Tier.CPU))
    rest = {Column("cache", Tier.GPU): 1.0, Column("activations", Tier.GPU): 1.0}
    whole, none = (figures.at(shares | rest)[-3] for shares in (on_gpu, on_cpu))
    assert whole > none  # all of them are more than the slots that others pass through
    room = np.array([none + 0.25 * (whole - none), 1e9, 1e9])
    solution = solve(figures, room, rest)
    assert solution.shares[Column("weights", Tier.GPU)] == pytest.approx(0.25, abs=1e-3)
    link = [figures.at(shares | rest)[:-3].max() for shares in (on_gpu, on_cpu)]
    assert link[1] > 10 * link[0]
    # A byte more of the GPU spares what the link takes for it, in prefill and decode.
    slower, faster = (solve(figures, room + [more, 0, 0], rest).seconds for more in (-1000, 1000))
    assert solution.saved[Tier.GPU] == pytest.approx((slower - faster) / 2000, rel=0.02)
    assert solution.saved[Tier.CPU] == pytest.approx(0, abs=1e-12)


def test_a_tier_has_one_codec(opt, machine):
    columns = (*PLAIN, Column("weights", Tier.CPU, "int4"), Column("cache", Tier.CPU, "int8"))
    cpu = {what: {"cpu": 100} for what in CLASSES}
    corners = Corners(Job(opt, machine(), Workload(40, 6, 8), torch.float32))
    figures = corners.figures(Policy(gpu_batch_size=4, num_gpu_batches=2, **cpu), columns)
    for room in (9e7, 1.2e8, 1.6e8, 3e8):
        solution = one_codec_each(figures, np.array([room, 1e8, 1e12]))
        if solution is not None:
            kept = [column[:2] for column in solution.shares]
            assert len(kept) == len(set(kept))
    assert solution is not None


@pytest.mark.parametrize(
    "fixed",
    [
        {"gpu_batch_size": 3},
        {"num_gpu_batches": 2, "overlap": False, "attend_on": "gpu"},
        {"weights": {"gpu": 20, "cpu": {"percent": 80, "codec": "int4"}}, "sep_layer": False},
        {"cache": {"cpu": 60, "disk": 40}, "activations": {"cpu": 100}, "attn_sparsity": 0.5},
        {"cache": {"gpu": 100}, "pin_weight": False, "gpu_batch_size": 4, "num_gpu_batches": 4},
    ],
)
def test_what_is_fixed_stays(fixed, opt, machine):
    found = quickly(opt, small(machine, "200MiB"), Workload(100, 5, 9), Auto(fixed, lossy=True))
    for candidate in (found.best, *found.runners_up):
        expected = Policy(**fixed)
        for name in fixed:
            assert getattr(candidate.policy, name) == getattr(expected, name)


COPYING = Workload(100, 60, 4, copied=3.0)


@pytest.mark.parametrize(
    ("workload", "changes", "fixed", "guesses"),
    [
        (COPYING, {}, {}, True),
        (replace(COPYING, copied=1.0), {}, {}, False),
        (
            COPYING,
            dict(products={"float32": [[1e-6, 1e5]]}),
            {},
            False,
        ),  # the products take longer than the link
        (COPYING, {}, {"cache": {"disk": 100}}, False),  # guesses do not work with it
        (COPYING, {}, {"guess": 0}, False),
        (replace(COPYING, copied=1.0), {}, {"guess": 2}, True),
    ],
)
def test_guesses_where_the_link_binds(workload, changes, fixed, guesses, opt, machine):
    best = quickly(opt, small(machine, "100MiB", **changes), workload, Auto(fixed)).best
    assert bool(best.policy.guess) == guesses
    plain = took(opt, best.policy.replace(guess=0), small(machine, "100MiB", **changes), workload)
    if guesses and "guess" not in fixed:
        assert best.prediction.report.total_s < plain


SHORT = Workload(20, 400, 96, mean_new=20)


@pytest.mark.parametrize(
    ("workload", "fixed"),
    [
        (SHORT, {"reserve_new": 0}),
        (SHORT, {"guess": 2}),
        (replace(SHORT, mean_new=None), {}),
        (replace(SHORT, mean_new=400), {}),
    ],
)
def test_all_cache_is_reserved_if_rows_are_long_or_you_say_so(workload, fixed, opt, machine):
    best = quickly(opt, small(machine, "100MiB"), workload, Auto(fixed)).best
    assert best.policy.reserve_new == 0


def test_guesses_are_tried_only_if_all_cache_is_reserved(opt, machine):
    choices = Choices(Job.checked(opt, machine(), replace(SHORT, copied=3.0)), Auto())
    assert list(choices.guessing(Policy())) and not list(choices.guessing(Policy(reserve_new=20)))


def test_less_cache_for_each_row_makes_room_for_more(opt, machine):
    hardware = small(machine, "100MiB")
    best = quickly(opt, hardware, SHORT).best
    whole = quickly(opt, hardware, SHORT, Auto({"reserve_new": 0})).best
    assert best.policy.reserve_new in (20, 40)
    assert best.tokens_s > 1.02 * whole.tokens_s
    again = predict(opt, best.policy, hardware, SHORT, order=best.order).report
    assert again.throughput_tokens_s == best.tokens_s
    for tier, nbytes in again.plan_bytes.items():
        assert nbytes <= hardware.capacity[tier]


@pytest.mark.parametrize(
    ("preset", "workload", "guesses"),
    [
        ("t4", Workload(128, 128, 768, copied=2.0), True),  # the link binds
        ("h200", Workload(512, 32, 1024, copied=2.0), False),  # the GPU computes all the time
    ],
)
def test_guesses_on_preset_machines(preset, workload, guesses):
    spec, _ = open_model("opt-30b", "dummy")
    job = Job.checked(spec, Hardware.preset(preset), workload)
    assert bool(find_for_job(job, Auto(), top=1, effort=QUICK).best.policy.guess) == guesses


MAY_BE_CHOSEN = [name for name, order in ORDERS.items() if not order.for_comparison]
ON_HOST = {"attend_on": "cpu", "cache": {"cpu": 100}, "gpu_batch_size": 4, "num_gpu_batches": 2}
"""With several batches attention is on the host: the policy's own order is overlap_cpu_attention."""


def test_another_order_than_the_policys_own_is_found(opt, machine):
    """The own one has room for three layers on their way, this one for two: on a small device more weights stay."""
    hardware, workload = small(machine, "200MiB"), Workload(16, 8, 8)
    found = find_policy(opt, hardware, workload, Auto(ON_HOST))
    own = find_policy(opt, hardware, workload, Auto(ON_HOST), order="overlap_cpu_attention").best
    best = found.best
    assert own.order == LINKED.choose_order(None, best.policy, 2).name
    assert ORDERS[best.order].slots.weights == 2 and best.tokens_s > 1.5 * own.tokens_s
    again = predict(opt, best.policy, hardware, workload, order=best.order).report
    assert again.throughput_tokens_s == best.tokens_s


@settings(max_examples=8)
@given(
    gpu=st.integers(60, 300),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    host=st.sampled_from([1e7, 1e9]),
    overlap=st.sampled_from([{}, {"overlap": True}, {"overlap": False}]),
)
def test_no_other_order_is_faster(gpu, attend_on, host, overlap, opt, machine):
    """Nor is one chosen for less than 1%, nor one that is there for comparison."""
    hardware = small(machine, gpu * MIB, host_attention={"float32": host})
    fixed = {"attend_on": attend_on, "gpu_batch_size": 2, "num_gpu_batches": 3} | overlap
    best = find_policy(opt, hardware, Workload(60, 5, 6), Auto(fixed)).best
    seconds = {}
    for name in MAY_BE_CHOSEN:
        if "overlap" in fixed and (name == "normal") == fixed["overlap"]:
            continue
        with contextlib.suppress(CapacityError):
            seconds[name] = took(opt, best.policy, hardware, Workload(60, 5, 6), order=name)
    own = LINKED.choose_order(None, best.policy, 3).name
    assert seconds[best.order] <= 1.0101 * min(seconds.values())
    assert best.order == own or seconds[best.order] < 0.995 * seconds.get(own, np.inf)


def test_layers_of_a_mixture_are_whole_if_that_overlaps_better():
    """Apart from attention, all experts pass through one of the two slots: nothing overlaps with their arithmetic."""
    spec, _ = open_model("qwen3-30b-a3b", "dummy")
    spec = replace(spec, layers=spec.layers[:8])
    card = Hardware.preset("rtx-4090")
    hardware = card.replace(capacity=card.capacity | {Tier.GPU: 5 << 30})
    job = Job.checked(spec, hardware, Workload(256, 32, 512))
    given = {"attend_on": "gpu", "gpu_batch_size": 64, "num_gpu_batches": 8}
    best = find_for_job(job, Auto(given), top=1).best
    apart, whole = (
        find_for_job(job, Auto(given | {"sep_layer": sep_layer}), top=1).best for sep_layer in (True, False)
    )
    assert not best.policy.sep_layer
    assert best.tokens_s >= 0.99 * whole.tokens_s and best.tokens_s > 1.05 * apart.tokens_s
    assert best.prediction.report.bound_share > 0.9


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_fixed_order_is_kept(order, opt, machine):
    found = quickly(opt, small(machine, "170MiB"), Workload(16, 8, 8), Auto(ON_HOST), order=order)
    assert {candidate.order for candidate in (found.best, *found.runners_up)} == {order}


def test_codecs_only_where_they_are_allowed_and_known(opt, machine):
    hardware, workload = small(machine, "150MiB", "150MiB"), Workload(100, 5, 8)
    shape = {"gpu_batch_size": 4, "num_gpu_batches": 2}
    exact, lossy = (quickly(opt, hardware, workload, Auto(shape, allowed)).best for allowed in (False, True))
    assert lossy.tokens_s > 1.1 * exact.tokens_s
    chosen = {split[tier].codec for split in (lossy.policy.weights, lossy.policy.cache) for tier in Tier}
    assert chosen - {"none"}
    # A machine that was measured knows them by the dtype that comes out.
    by_dtype = hardware.replace(decoding={f"float32 {codec}": 1e8 for codec in ("int4", "int8")})
    assert quickly(opt, by_dtype, workload, Auto(shape, lossy=True)).best.policy == lossy.policy
    others = hardware.replace(decoding={"float16 int4": 1e8, "float16 int8": 1e8})
    found = quickly(opt, others, workload, Auto(shape, lossy=True)).best.policy
    assert not {found.weights[tier].codec for tier in Tier} & {"int4", "int8"}
    none = hardware.replace(decoding={}, device_attention={"float32": 1e8}, host_attention={"float32": 1e7})
    found = quickly(opt, none, workload, Auto(shape, lossy=True)).best.policy
    chosen = {split[tier].codec for split in (found.weights, found.cache) for tier in Tier}
    assert not chosen & {"int4", "int8"}, "a codec that expects nothing of a machine needs its figures"
    assert "fp8" in chosen, "fp8 expects its rates of the machine's memory"


def test_codecs_that_round_activations_are_only_chosen_by_name(opt, host, monkeypatch):
    """They would be chosen: on this machine they are far faster than the other codecs."""
    rounded = ("int4_a8", "int8_a8")
    decoding = {codec: 1e12 if codec in rounded else 1e6 for codec in CODECS if codec != "fp8"}
    hardware = host(capacity={"cpu": "150MiB", "disk": "4GiB"}, decoding=decoding)
    workload, shape = Workload(100, 5, 8), {"gpu_batch_size": 4, "num_gpu_batches": 2}

    def chosen(fixed):
        found = quickly(opt, hardware, workload, Auto(fixed, lossy=True)).best.policy
        return {split[tier].codec for split in (found.weights, found.cache) for tier in Tier}

    assert not chosen(shape) & set(rounded)
    assert "int8_a8" in chosen(shape | {"weights": {"disk": {"percent": 100, "codec": "int8_a8"}}})
    monkeypatch.setattr(RoundedGroupwise, "searched", True)
    assert chosen(shape) & set(rounded)


def test_a_host_has_two_tiers_and_nowhere_else_to_attend(opt, host):
    hardware = host(capacity={"cpu": "190MiB", "disk": "4GiB"})
    found = find_policy(opt, hardware, Workload(100, 5, 8))
    assert not any(getattr(found.best.policy, what).percent(Tier.GPU) for what in CLASSES)
    assert any(getattr(found.best.policy, what).percent(Tier.DISK) for what in CLASSES)
    assert any(re.search(r"^cpu tier is full: .* of 190 MiB", words) for words in found.best.limits)


def test_it_says_what_was_chosen_and_why(opt, machine):
    found = find_for_job(Job.checked(opt, small(machine, "150MiB"), Workload(100, 5, 8)), Auto(), top=3)
    report = found.best.prediction.report
    assert (
        f"predicted {report.throughput_tokens_s:.4g} tokens/s, bound by {report.bottleneck}" in found.line()
    )
    assert re.match(
        r"weights .*; cache .*; activations .*; \d+ x \d+ prompts; (overlap|normal)", found.line()
    )
    assert len(found.runners_up) == 2 and found.considered > 3 and found.seconds > 0
    header, *rows = found.table().splitlines()
    assert header.startswith("tokens/s") and len(rows) == 3
    assert any("is the slowest lane of the decode" in words for words in found.best.limits)
    assert any("gpu tier is full" in words for words in found.best.limits)


def test_one_new_token_has_no_decode(opt, machine):
    """A job of too many cells to simulate: a small model represents it."""
    fixed = {"gpu_batch_size": 1, "num_gpu_batches": 400}
    best = find_policy(opt, machine(), Workload(16, 1, 400), Auto(fixed)).best
    assert best.policy.block_size == 400 and best.prediction.report.decode_s == pytest.approx(0, abs=0.1)


def test_the_last_block_is_about_as_full_as_the_others(opt, machine):
    best = quickly(opt, small(machine, "150MiB"), Workload(100, 5, 13), Auto({"num_gpu_batches": 3})).best
    blocks = -(-13 // best.policy.block_size)
    assert blocks * best.policy.block_size - 13 < best.policy.num_gpu_batches * blocks


def test_the_whole_models_plan_says_what_fits():
    """The model of six layers that represents the overlap of the whole one needs more than the GPU has."""
    shape = dict(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672)
    config = LlamaConfig(
        **shape, vocab_size=128256, num_hidden_layers=80, max_position_embeddings=8192, dtype="bfloat16"
    )
    spec, _ = open_model(config, "dummy")
    policy = Policy(
        gpu_batch_size=1667,
        num_gpu_batches=6,
        weights={"gpu": 3, "disk": 97},
        cache={"cpu": {"percent": 34, "codec": "int4"}, "disk": {"percent": 66, "codec": "int4"}},
        activations={"gpu": 100},
        attend_on="cpu",
        sep_layer=False,
    )
    hardware, workload = Hardware.preset("rtx-4090"), Workload(50, 20, 10_000)
    asked = dict(auto=Auto(policy.to_dict(), lossy=True), order="overlap_cpu_attention")
    best = find_policy(spec, hardware, workload, **asked).best
    assert best.policy == policy
    assert all(best.prediction.plan.on(tier) <= hardware.capacity[tier] for tier in Tier)


def test_prompts_are_computed_in_parts_where_whole_ones_do_not_fit(opt, machine):
    workload = Workload(2000, 5, 4)
    for gpu, chunk in (("120MiB", 0), ("100MiB", 500)):
        hardware = small(machine, gpu)
        best = find_for_job(Job.checked(opt, hardware, workload), Auto(), top=1).best
        assert best.policy.prefill_chunk == chunk
        assert all(best.prediction.plan.on(tier) <= hardware.capacity[tier] for tier in Tier)
    with pytest.raises(CapacityError):
        find_policy(opt, hardware, workload, Auto({"prefill_chunk": 2000}))


def test_what_fits_nowhere_is_refused_with_what_is_short(opt, machine):
    with pytest.raises(CapacityError) as refused:
        quickly(opt, small(machine, "30MiB", "30MiB"), Workload(100, 5, 8))
    said = str(refused.value)
    assert re.match(r"no policy for .* fits round, which is short by [\d.]+ MiB of (gpu|cpu)", said)
    assert re.search(
        r"the policy needs .* on the (gpu|cpu) tier, which has 30 MiB .*, with 1 x 1 prompts", said
    )
    with pytest.raises(CapacityError, match=r"short by [\d.]+ MiB of gpu"):
        quickly(opt, small(machine, "150MiB"), Workload(24, 5, 8), Auto({"weights": {"gpu": 100}}))


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"fixed": {"weight": {"gpu": 100}}}, PolicyError, "unknown key 'weight'"),
        ({"fixed": {"weights": {"gpu": 50}}}, PolicyError, "must be 100"),
        ({"order": "zigzag"}, ScheduleError, "order 'zigzag' is not known"),
        ({"dtype": "bfloat16"}, RequestError, "has no figures"),
    ],
)
def test_what_makes_no_sense_is_refused(asked, error, said, opt, machine):
    with pytest.raises(error, match=said):
        find_policy(opt, machine(), Workload(4, 4, 2), Auto(asked.pop("fixed", {})), **asked)


def test_a_codec_that_is_fixed_needs_figures(opt, machine):
    asked = {"weights": {"cpu": {"percent": 100, "codec": "int4"}}}
    with pytest.raises(HardwareError, match=r"no figure decoding\.int4"):
        find_policy(opt, machine(decoding={}), Workload(24, 4, 8), Auto(asked))


def test_a_search_leaves_nothing_that_refers_to_itself(opt, machine):
    """So all of it is freed at once, though Python looks for no cycles meanwhile."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        find_policy(opt, small(machine, "150MiB"), Workload(100, 5, 8))
        gc.collect()
        left = {type(each).__name__ for each in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left & {
        "Corners",
        "PlacedModel",
        "StepCosts",
        "Simulations",
        "Prediction",
        "Timeline",
        "Policy",
    }
