"""Predictions: hand-computed timelines, the engine's own plan and refusals, monotone in what hardware gives."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexgen import OptLM, Policy
from flexgen.errors import CapacityError, HardwareError, RequestError, ScheduleError
from flexgen.memory.machine import PINNED_SHARE
from flexgen.models import open_model
from flexgen.policy import Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict, predict_job, roofline
from flexgen.results.trace import LaneName, Phase
from flexgen.schedule.orders import ORDERS, Order, Slots
from flexgen.schedule.steps import Op
from flexgen.workload import Workload

SPLITS = st.sampled_from(
    [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, {"gpu": 34, "cpu": 33, "disk": 33}, {"cpu": 50, "disk": 50}]
)
ENCODED = st.just(
    {"gpu": {"percent": 40, "codec": "int4"}, "cpu": 30, "disk": {"percent": 30, "codec": "int8"}}
)
POLICIES = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 6),
    num_gpu_batches=st.integers(1, 4),
    weights=SPLITS | ENCODED,
    cache=SPLITS | ENCODED,
    activations=SPLITS,
    attend_on=st.sampled_from(["cpu", "gpu"]),
    overlap=st.booleans(),
    sep_layer=st.booleans(),
)


@pytest.fixture(scope="module")
def specs(configs):
    return {name: open_model(config, "dummy")[0] for name, config in configs.items()}


@pytest.fixture(scope="module")
def opt(specs):
    return specs["opt"]


def by_hand(machine, **changes):
    """A machine on which only products and the link take time: 1 s for a mega-flop, 1 s for a mega-byte."""
    fields = dict(
        bandwidth={
            "to_device": 1e6,
            "from_device": 1e18,
            "disk_read": 1e18,
            "disk_write": 1e18,
            "host": 1e18,
        },
        products={"float32": [[1e-6, 1e6]]},
        prefill_attention={"float32": 1e18},
        device_attention={"float32": 1e18},
        host_attention={"float32": 1e18},
        fixed={},
    )
    return machine(**fields | changes)


def layers_of(model):
    """(seconds of the link, seconds of a token's products) of every layer of the tiny OPT, from its sizes."""
    hidden, ffn, vocab = 64, 192, 96
    attention = 4 * hidden * hidden, 6 * hidden
    mlp = 2 * hidden * ffn, hidden + ffn + 2 * hidden
    return [
        *[(4 * sum(part) / 1e6, 2 * part[0] / 1e6) for _ in range(2) for part in (attention, mlp)],
        (4 * (vocab * hidden + 2 * hidden) / 1e6, 2 * vocab * hidden / 1e6),
    ]


def test_without_overlap_a_run_is_the_sum(opt, machine):
    policy = Policy(gpu_batch_size=3, weights={"cpu": 100}, overlap=False)
    report = predict(opt, policy, by_hand(machine), Workload(5, 4, 3)).report
    # Only the table's rows of the ids are copied, with the ids; positions come whole.
    ids, embedding = (8 + 4 * 64) / 1e6, 4 * 64 * (4096 + 2) / 1e6
    link = embedding + sum(link for link, _ in layers_of(opt))
    *body, head = [products for _, products in layers_of(opt)]
    adding = 64 / 1e6  # positions are added to the embedding
    prefill = link + 3 * (5 * (sum(body) + adding + ids) + head)
    later = link + 3 * (sum(body) + head + adding + ids)
    assert report.prefill_s == pytest.approx(prefill, rel=1e-3)
    assert report.decode_s == pytest.approx(3 * later, rel=1e-3)
    assert report.lanes[LaneName.TO_DEVICE] == pytest.approx(4 * link + 3 * 8 * ids, rel=1e-3)
    assert report.throughput_tokens_s == pytest.approx(12 / (prefill + 3 * later), rel=1e-3)


def test_guesses_are_computed_and_passes_are_fewer(opt, machine):
    """A pass computes five tokens of each row, and three of them are new ones, so one pass makes the last three."""
    policy = Policy(gpu_batch_size=3, weights={"cpu": 100}, overlap=False, guess=4)
    plain = predict(opt, policy.replace(guess=0), by_hand(machine), Workload(8, 4, 3, copied=3))
    guessing = predict(opt, policy, by_hand(machine), Workload(8, 4, 3, copied=3))
    ids, embedding = (8 + 4 * 64) / 1e6, 4 * 64 * (4096 + 2) / 1e6
    link = embedding + sum(link for link, _ in layers_of(opt))
    *body, head = [products for _, products in layers_of(opt)]
    adding = 64 / 1e6
    assert plain.report.decode_s == pytest.approx(
        3 * (link + 3 * (sum(body) + head + adding + ids)), rel=1e-3
    )
    later = link + 3 * 5 * (sum(body) + head + adding + ids)
    assert guessing.report.decode_s == pytest.approx(later, rel=1e-3)
    assert guessing.report.prefill_s == pytest.approx(plain.report.prefill_s, rel=1e-3)
    assert guessing.plan.on(Tier.GPU) > plain.plan.on(Tier.GPU), "logits of guesses"
    most = predict(opt, policy, by_hand(machine), Workload(8, 4, 3, copied=50)).report
    assert most.decode_s == pytest.approx(later, rel=1e-3), "a pass keeps at most all guesses"
    none = predict(opt, policy, by_hand(machine), Workload(8, 4, 3)).report
    assert none.decode_s == pytest.approx(plain.report.decode_s, rel=1e-3), (
        "a run does not compute wrong ones"
    )


def test_reads_that_find_the_disk_idle_start_later(opt, machine):
    """In a serial order, most reads find it idle. Otherwise, most of them start while another one ends."""
    workload, start, late = Workload(5, 4, 3), 1e-3, {}
    hardware = by_hand(machine)
    hardware = hardware.replace(bandwidth={**hardware.bandwidth, "disk_read": 1e6})
    for overlap in (False, True):
        policy = Policy(gpu_batch_size=3, weights={"disk": 100}, overlap=overlap)
        plain, slow = (
            predict(opt, policy, hardware.replace(start={"disk_read": each}), workload) for each in (0, start)
        )
        reads = sum(event.lane is LaneName.DISK_READ for event in plain.trace().events)
        late[overlap] = (slow.report.total_s - plain.report.total_s) / (reads * start)
    assert 0.5 < late[False] <= 1 + 1e-6
    assert -1e-6 < late[True] < late[False]


def test_a_prefill_in_parts_brings_the_weights_for_each_part(opt, machine):
    """Five tokens in parts of 1, 2 and 2. The head computes for the last part only."""
    policy = Policy(gpu_batch_size=3, weights={"cpu": 100}, overlap=False, prefill_chunk=2)
    prediction = predict(opt, policy, by_hand(machine), Workload(5, 4, 3))
    report = prediction.report
    ids, embedding = (8 + 4 * 64) / 1e6, 4 * 64 * (4096 + 2) / 1e6
    link = embedding + sum(link for link, _ in layers_of(opt))
    *body, head = [products for _, products in layers_of(opt)]
    adding = 64 / 1e6
    prefill = 3 * link + 3 * (5 * (sum(body) + adding + ids) + head)
    later = link + 3 * (sum(body) + head + adding + ids)
    assert report.prefill_s == pytest.approx(prefill, rel=1e-3)
    assert report.decode_s == pytest.approx(3 * later, rel=1e-3)
    assert report.phases[Phase.PREFILL][LaneName.TO_DEVICE] == pytest.approx(3 * link + 15 * ids, rel=1e-3)
    assert {event.step.token for event in prediction.trace().events} == set(range(-2, 4))
    assert report.projected_from is None


def test_with_overlap_the_longer_lane_hides_the_other(opt, machine):
    policy = Policy(gpu_batch_size=2, num_gpu_batches=3, weights={"cpu": 100})
    slow_link, slow_products = (by_hand(machine, products={"float32": [[1e-6, rate]]}) for rate in (1e9, 1e4))
    for hardware, lane in ((slow_link, LaneName.TO_DEVICE), (slow_products, LaneName.COMPUTE)):
        report = predict(opt, policy, hardware, Workload(4, 40, 6)).report
        assert report.bottleneck is lane
        assert report.bound_share > 0.97
    normal = predict(opt, policy.replace(overlap=False), slow_link, Workload(4, 40, 6)).report
    assert normal.total_s == pytest.approx(sum(normal.lanes.values()), rel=1e-6)


def test_flexgens_order_adds_weights_to_the_rest_and_hides_cells(opt, machine):
    policy = Policy(gpu_batch_size=2, num_gpu_batches=3, weights={"cpu": 100})
    workload = Workload(4, 6, 6)
    link_and_products = predict(opt, policy, by_hand(machine), workload, order="flexgen").report
    normal = predict(opt, policy, by_hand(machine), workload, order="normal").report
    assert link_and_products.total_s == pytest.approx(normal.total_s, rel=1e-3)
    cells = policy.replace(weights={"gpu": 100}, cache={"cpu": 100}, attend_on="gpu")
    balanced = by_hand(machine, products={"float32": [[1e-6, 5e6]]})
    hidden, shown = (
        predict(opt, cells, balanced, workload, order=name).report for name in ("flexgen", "normal")
    )
    assert hidden.total_s < 0.9 * shown.total_s


def test_an_order_that_is_defined_again_is_timed_as_it_is_now(opt, machine, monkeypatch):
    """Under the same name and on the same grid."""
    policy = Policy(gpu_batch_size=2, num_gpu_batches=3, weights={"cpu": 100})

    def seconds(name, shipped):
        monkeypatch.setitem(ORDERS, name, Order(name, ORDERS[shipped].generate, Slots()))
        return predict(opt, policy, by_hand(machine), Workload(4, 6, 6), order=name).report.total_s

    first = seconds("mine", "overlap_multi_batch")
    assert seconds("mine", "normal") == seconds("another", "normal") != first


@settings(max_examples=60)
@given(
    policy=POLICIES,
    name=st.sampled_from(["opt", "llama, grouped"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    what=st.sampled_from([*(f"bandwidth.{lane}" for lane in LaneName if lane is not LaneName.COMPUTE), "products",
                          "prefill_attention", "device_attention", "host_attention", "fixed"]),
    factor=st.floats(1.01, 100),
    shared=st.booleans(),
)  # fmt: skip
def test_a_faster_machine_never_takes_longer(policy, name, order, what, factor, shared, specs, machine, host):
    table, _, lane = what.partition(".")
    slow = host() if shared else machine()
    if table == "bandwidth":
        fast = slow.replace(
            bandwidth={**slow.bandwidth, LaneName(lane): slow.bandwidth[LaneName(lane)] * factor}
        )
    elif table == "products":
        fast = slow.replace(products={"float32": [[r, f * factor] for r, f in slow.products["float32"]]})
    elif table == "fixed":
        fast = slow.replace(fixed={})
    else:
        fast = slow.replace(**{table: {key: rate * factor for key, rate in getattr(slow, table).items()}})
    took = [
        predict(specs[name], policy, hardware, Workload(7, 9, 11), order=order).report.total_s
        for hardware in (slow, fast)
    ]
    assert took[1] <= took[0] * (1 + 1e-12)


@pytest.mark.parametrize("what", ["weights", "cache", "activations"])
def test_shares_on_faster_tiers_take_less(what, opt, machine):
    policy = Policy(gpu_batch_size=4, attend_on="gpu", overlap=False)
    took = [
        predict(opt, policy.replace(**{what: {tier: 100}}), machine(), Workload(300, 8, 4)).report.total_s
        for tier in Tier
    ]
    assert took[0] < took[1] < took[2]


@settings(max_examples=25)
@given(
    policy=POLICIES,
    device=st.sampled_from(["emulated", "cpu"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    prompts=st.integers(1, 30),
)
def test_the_plan_is_the_engines(policy, device, order, prompts, configs, specs, machine, host):
    predicted = predict(
        specs["opt"], policy, host() if device == "cpu" else machine(), Workload(5, 3, prompts), order=order
    )
    with OptLM(configs["opt"], policy, device=device, weights="dummy", progress=False, order=order) as model:
        model.generate(np.full((prompts, 5), 7), 3, stop=())
        assert predicted.plan == model.stats.plan
    assert predicted.report.plan_bytes == model.stats.plan.by_tier
    # One computation for each cell of every block, with the names of the run's layers.
    computed = sum(
        event.step.op is Op.COMPUTE and event.lane is LaneName.COMPUTE for event in predicted.trace().events
    )
    batches = sum(-(-min(left, policy.block_size) // policy.gpu_batch_size)
                  for left in range(prompts, 0, -policy.block_size))  # fmt: skip
    assert computed == 3 * len(model.layer_names) * batches
    assert list(predicted.layer_names) == model.layer_names


@pytest.mark.parametrize("cuts", [(), (40,)])
@pytest.mark.parametrize("mean_new", [None, 2.0])
def test_groups_run_one_after_another(cuts, mean_new, opt, machine):
    """A job of groups takes as long as its groups alone, if the parts that all of them share are computed once."""
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights={"cpu": 100})
    job = Workload(90, 3, 13, prefix=80, cuts=cuts, groups=2, mean_new=mean_new)
    alone = [Workload(90, 3, count, prefix=80, cuts=cuts, mean_new=mean_new) for count in (7, 6)]
    both = predict(opt, policy, machine(), job).report
    each = [predict(opt, policy, machine(), one).report for one in alone]
    computed_twice = 0.0
    if cuts:
        one = policy.replace(gpu_batch_size=1, num_gpu_batches=1, attend_on="gpu")
        computed_twice = predict(opt, one, machine(), Workload(40, 1, 1)).report.total_s
    assert both.total_s == pytest.approx(sum(one.total_s for one in each) - computed_twice)
    assert both.new_tokens == (None if mean_new is None else sum(one.new_tokens for one in each))
    assert (both.prefix, both.prefix_groups) == (40 if cuts else 0, 2)
    assert both.reused_tokens == 13 * 80 - (40 + 2 * 40 if cuts else 2 * 80)


def test_weights_that_the_disk_cannot_hold_are_refused_by_their_size(opt, machine):
    full = machine(capacity={"gpu": "1GiB", "cpu": "1GiB", "disk": "1KiB"})
    with pytest.raises(
        CapacityError, match=r"weights on the disk tier take [\d.]+ \wiB, but round has 1 KiB: "
    ):
        predict(opt, Policy(weights={"disk": 100}), full, Workload(10, 4, 1))
    assert predict(
        opt, Policy(weights={"gpu": 100}, cache={"gpu": 100}), full, Workload(10, 4, 1)
    ).report.total_s


def test_what_does_not_fit_is_refused_as_the_engine_does(opt, configs, machine):
    policy = Policy(gpu_batch_size=8, num_gpu_batches=2, share_prefix=False)  # all prompts are equal
    small = machine(capacity={"gpu": "2MiB", "cpu": "1GiB", "disk": "1GiB"})
    with pytest.raises(CapacityError) as predicted:
        predict(opt, policy, small, Workload(100, 4, 16))
    with (
        pytest.raises(CapacityError) as ran,
        OptLM(
            configs["opt"], policy, device="emulated:memory=2MiB", weights="dummy", progress=False
        ) as model,
    ):
        model.generate(np.full((16, 100), 5), 4, stop=())
    assert str(predicted.value) == str(ran.value)
    assert re.search(r"on the gpu tier, which has 2 MiB .*would fit with gpu_batch_size", str(ran.value))


def test_weights_on_disk_take_of_the_disk(opt, machine):
    tight = machine(capacity={"gpu": 10**9, "cpu": 10**9, "disk": 1_400_000})
    policy = Policy(weights={"disk": 100}, cache={"disk": 100})
    with pytest.raises(CapacityError, match="on the disk tier"):
        predict(opt, policy, tight, Workload(100, 4, 1))
    assert predict(opt, policy.replace(weights={"gpu": 100}), tight, Workload(100, 4, 1))


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (dict(order="zigzag"), ScheduleError, "order 'zigzag' is not known; known: flexgen, normal"),
        (dict(dtype="bfloat16"), RequestError, "dtype 'bfloat16' has no figures for 'round'; use one of float32"),
        (dict(workload=Workload(4000, 97, 1)), RequestError, "exceed the 4096 positions"),
        (dict(hardware=dict(decoding={}), policy=Policy(weights={"gpu": {"percent": 100, "codec": "int4"}})),
         HardwareError, "no figure decoding.int4, only for nothing"),
    ],
)  # fmt: skip
def test_an_impossible_prediction_is_reported(asked, error, said, opt, machine):
    fields = dict(policy=Policy(), workload=Workload(4, 4, 1), hardware={}) | asked
    hardware = machine(**fields.pop("hardware"))
    with pytest.raises(error, match=re.escape(said)):
        predict(opt, hardware=hardware, **fields)


def test_a_prediction_of_no_tokens_is_refused(opt, machine):
    with pytest.raises(RequestError, match="samples is 0, but it must be at least 1; use None"):
        predict_job(Job.checked(opt, machine(), Workload(4, 64, 1)), Policy(), samples=0)


def test_auto_takes_a_dtype_that_the_machine_has(opt, machine):
    half = machine(
        products={"float16": [[8, 1e9]]},
        prefill_attention={"float16": 1e9},
        device_attention={"float16": 1e8},
        computes_in={},
    )
    assert predict(opt, Policy(), half, Workload(4, 2, 1)).report.dtype == "float16"


def test_blocks_of_equal_shape_take_equally_long(opt, machine):
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2)
    one, three, more = (predict(opt, policy, machine(), Workload(6, 5, n)) for n in (4, 12, 13))
    assert three.report.total_s == pytest.approx(3 * one.report.total_s)
    assert three.report.lanes[LaneName.COMPUTE] == pytest.approx(3 * one.report.lanes[LaneName.COMPUTE])
    assert three.trace().span == pytest.approx(three.report.total_s)
    assert three.report.total_s < more.report.total_s < 4 / 3 * three.report.total_s
    assert max(event.step.batch for event in three.trace().events) == 1


@settings(max_examples=60)
@given(
    policy=POLICIES,
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    prompt_len=st.integers(1, 200),
    gen_len=st.integers(12, 120),
    samples=st.sampled_from([1, 3, 8]),
    shared=st.booleans(),
)
def test_a_sampled_prediction_is_close(
    policy, order, prompt_len, gen_len, samples, shared, opt, machine, host
):
    hardware, workload = host() if shared else machine(), Workload(prompt_len, gen_len, policy.block_size)
    exact, sampled = (
        predict_job(Job.checked(opt, hardware, workload, order=order), policy, n).report
        for n in (None, samples)
    )
    assert sampled.prefill_s == pytest.approx(exact.prefill_s, rel=0.05)
    assert sampled.total_s == pytest.approx(exact.total_s, rel=0.05)
    assert set(sampled.lanes) == set(exact.lanes)
    assert sampled.lanes[LaneName.COMPUTE] == pytest.approx(exact.lanes[LaneName.COMPUTE], rel=0.05)
    assume(samples + 7 < gen_len)
    assert sampled.projected_from < gen_len and exact.projected_from is None


def test_a_long_generation_is_sampled_by_itself(opt, machine):
    policy = Policy(gpu_batch_size=2, num_gpu_batches=10)
    prediction = predict(opt, policy, machine(), Workload(8, 3000, 20))
    assert prediction.report.projected_from == 12
    tokens = {event.step.token for event in prediction.trace().events}
    assert {0, 1, 2, 2998, 2999} <= tokens and len(tokens) == 12


def test_a_single_token_is_all_prefill(opt, machine):
    report = predict(opt, Policy(), machine(), Workload(8, 1, 1)).report
    assert report.decode_s == 0 and report.prefill_s > 0


@pytest.mark.parametrize("name", ["t4", "t4-paper", "rtx-4090", "h200"])
def test_presets_answer_for_a_model_that_does_not_fit_their_gpu(name):
    cpu = {"cpu": 100}
    weights = {"gpu": 10, "cpu": 90}
    policy = Policy(gpu_batch_size=16, num_gpu_batches=2, weights=weights, cache=cpu, activations=cpu)
    spec, _ = open_model("opt-13b", "dummy")
    report = predict_job(Job.checked(spec, Hardware.preset(name), Workload(256, 16, 32)), policy, 1).report
    assert 1 < report.throughput_tokens_s < 1000 and 0.3 < report.bound_share <= 1


@pytest.mark.parametrize("weights", [{"gpu": 100}, {"cpu": 100}])
def test_a_roofline_has_bytes_and_flops_alone(machine, opt, weights):
    starved = by_hand(
        machine,
        fixed={"cell": 1.0, "stage": 1.0},
        elementwise={"float32": [[1.0, 1e-3]]},
        around_attention={"float32": 1e-3},
    )
    job = opt, Policy(gpu_batch_size=2, weights=weights), starved, Workload(6, 4, 2)
    found = roofline(*job, dtype="float32")
    assert found == predict(*job[:2], by_hand(machine), job[3], dtype="float32").report.phases
    slow = predict(*job, dtype="float32").report
    for phase in Phase:
        assert 0 < found[phase][LaneName.COMPUTE] < slow.phases[phase][LaneName.COMPUTE] / 2
    moved = sum(found[phase].get(LaneName.TO_DEVICE, 0.0) for phase in Phase)
    assert (moved > 0.1) == (weights == {"cpu": 100})


@pytest.mark.parametrize(("pins", "pinned"), [(True, 1.0), (True, 0.9), (False, 0.0)])
def test_what_is_not_pinned_crosses_the_link_more_slowly(opt, machine, pins, pinned):
    """`pinned`: the part that can be pinned of what the link copies from and to."""
    policy, workload = Policy(gpu_batch_size=3, weights={"cpu": 100}, pin_weight=pins), Workload(5, 4, 3)
    first = predict(opt, policy, by_hand(machine), workload)
    copied = sum(n.nbytes for n in first.plan.needs if n.tier is Tier.CPU and n.role != "workspace")
    capacity = by_hand(machine).capacity | {Tier.CPU: math.ceil((pinned or 1) * copied / PINNED_SHARE)}
    slow = by_hand(machine, pageable={"to_device": 1e5}, capacity=capacity)
    report = predict(opt, policy, slow, workload).report
    times = pinned + 10 * (1 - pinned)
    before = first.report.lanes[LaneName.TO_DEVICE]
    assert report.lanes[LaneName.TO_DEVICE] == pytest.approx(times * before, rel=1e-3)


def test_cache_that_the_host_attends_over_is_not_pinned(opt, machine):
    """So it leaves what can be pinned to the weights."""
    policy = Policy(gpu_batch_size=3, weights={"cpu": 100}, cache={"cpu": 100})
    workload, lanes = Workload(5, 4, 3), {}
    for attend_on in ("cpu", "gpu"):
        asked = policy.replace(attend_on=attend_on)
        taken = predict(opt, asked, by_hand(machine), workload).plan.on(Tier.CPU)
        capacity = by_hand(machine).capacity | {Tier.CPU: taken}
        slow = by_hand(machine, pageable={"to_device": 1e5}, capacity=capacity)
        both = (predict(opt, asked, each, workload).report for each in (by_hand(machine), slow))
        fast, slower = (report.lanes[LaneName.TO_DEVICE] for report in both)
        lanes[attend_on] = slower / fast
    assert 1 <= lanes["cpu"] < lanes["gpu"]
