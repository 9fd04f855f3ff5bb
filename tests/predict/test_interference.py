"""Lanes that take something from each other, and products of matrices in every form that was measured."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import HardwareError
from flexgen.layout.placement import place_weights
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy
from flexgen.predict.arithmetic import Arithmetic
from flexgen.predict.hardware import Hardware
from flexgen.predict.numbering import numbered
from flexgen.predict.prediction import predict
from flexgen.predict.timeline import play, play_with_losses, works_of
from flexgen.results.trace import LaneName, Phase
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Grid, Op
from flexgen.workload import Workload

COMPUTE, LINK, READ = LaneName.COMPUTE, LaneName.TO_DEVICE, LaneName.DISK_READ


def laid_out(order, grid, seconds, losses):
    """Both timelines, with and without `losses` (of both phases); a stage for each op in `seconds`."""
    lanes = {Op.LOAD_WEIGHTS: LINK, Op.COMPUTE: COMPUTE, Op.LOAD_CACHE: READ}
    steps = numbered(order, grid)

    def costs(step):
        return [[(lanes[step.op], seconds[step.op])]] if step.op in seconds else []

    works = works_of(steps, costs)
    return play(steps, works), play_with_losses(steps, works, dict.fromkeys(Phase, losses))


def test_what_never_overlaps_loses_nothing():
    grid = Grid(tokens=2, layers=3, batches=2, weight_slots=1, cell_slots=1)
    seconds = {Op.LOAD_WEIGHTS: 5.0, Op.COMPUTE: 2.0}
    alone, together = laid_out(ORDERS["normal"], grid, seconds, {(COMPUTE, LINK): 0.5, (LINK, COMPUTE): 0.5})
    assert together.events == alone.events


def test_full_overlap_by_hand():
    """Computing takes longer than loading and loses half of its rate while a load is under way."""
    grid = Grid(tokens=1, layers=2, batches=1)
    seconds = {Op.LOAD_WEIGHTS: 2.0, Op.COMPUTE: 3.0}
    _, together = laid_out(ORDERS["overlap_single_batch"], grid, seconds, {(COMPUTE, LINK): 0.5})
    found = {(e.step.op, e.step.layer): (e.start, e.end) for e in together.events}
    assert found[Op.LOAD_WEIGHTS, 0] == (0.0, 2.0)  # overlaps with nothing
    assert found[Op.LOAD_WEIGHTS, 1] == (2.0, 4.0)
    # The first computation overlaps with the load for 2 seconds, in which it does 1 second of its work.
    begin, end = found[Op.COMPUTE, 0]
    assert begin == 2.0 and end == pytest.approx(6.0, rel=0.02)
    begin, end = found[Op.COMPUTE, 1]
    assert end - begin == pytest.approx(3.0)


def test_a_lane_that_always_runs_with_another():
    grid = Grid(tokens=1, layers=40, batches=1)
    seconds = {Op.LOAD_WEIGHTS: 1.0, Op.COMPUTE: 1.0}
    losses = {(COMPUTE, LINK): 0.25, (LINK, COMPUTE): 0.25}
    alone, together = laid_out(ORDERS["overlap_single_batch"], grid, seconds, losses)
    assert alone.span == 41.0
    assert together.span == pytest.approx(41 / 0.75, rel=0.03)


def test_each_phase_loses_its_own_share():
    """Each computation overlaps with a load of a second and loses half of its rate there: it takes 1.5 seconds."""
    grid = Grid(tokens=3, layers=20, batches=1)
    steps = numbered(ORDERS["overlap_single_batch"], grid)
    seconds = {Op.LOAD_WEIGHTS: (LINK, 1.0), Op.COMPUTE: (COMPUTE, 1.0)}

    def spans(losses):
        works = works_of(steps, lambda step: [[seconds[step.op]]] if step.op in seconds else [])
        made = play_with_losses(steps, works, losses)
        ends = [max(e.end for e in made.events if e.step.token == n and e.lane is COMPUTE) for n in range(3)]
        return ends[0], ends[2] - ends[0]

    pair = {(COMPUTE, LINK): 0.5}
    assert spans({}) == (21.0, 40.0)
    prefill, decode = spans({Phase.PREFILL: pair})
    assert prefill == pytest.approx(31, rel=0.05) and decode == pytest.approx(40, rel=0.01)
    prefill, decode = spans({Phase.DECODE: pair})
    assert prefill == pytest.approx(21, rel=0.05) and decode == pytest.approx(60, rel=0.05)


@given(
    order=st.sampled_from(["normal", "overlap_single_batch", "overlap_multi_batch"]),
    seconds=st.fixed_dictionaries(
        {op: st.floats(0, 5) for op in (Op.LOAD_WEIGHTS, Op.LOAD_CACHE, Op.COMPUTE)}
    ),
    shares=st.lists(st.floats(0, 0.9), min_size=6, max_size=6),
    batches=st.integers(1, 3),
)
def test_nothing_gets_faster_and_losses_have_an_end(order, seconds, shares, batches):
    pairs = list(itertools.permutations((COMPUTE, LINK, READ), 2))
    grid = ORDERS[order].grid(3, 3, batches, 1)
    alone, together = laid_out(ORDERS[order], grid, seconds, dict(zip(pairs, shares, strict=True)))
    for a, b in zip(alone.events, together.events, strict=True):
        assert (a.step, a.lane) == (b.step, b.lane)
        assert a.end - a.start <= (b.end - b.start) + 1e-9 <= 10 * (a.end - a.start) + 1e-6
    assert alone.span <= together.span + 1e-6


def test_a_prediction_is_slower_where_lanes_interfere(host, configs):
    spec, _ = open_model(configs["opt"], "dummy")
    policy, workload = Policy(gpu_batch_size=4, weights={"disk": 100}), Workload(16, 4, 4)
    quiet = predict(spec, policy, host(), workload)
    both = {"compute disk_read": 0.5, "disk_read compute": 0.5}
    loud = predict(spec, policy, host(interference=both), workload)
    assert loud.report.prefill_s + loud.report.decode_s > quiet.report.prefill_s + quiet.report.decode_s
    # What a lane takes alone, and with it the bound, is another question.
    assert loud.report.phases == quiet.report.phases


def arithmetic(hardware, configs, codec="none", tier="cpu"):
    spec, _ = open_model(configs["opt"], "dummy")
    layers = build_layers(spec)
    weights = Policy(weights={tier: {"percent": 100, "codec": codec}}).weights
    return Arithmetic(place_weights(layers, weights, spec.dtype), hardware), layers[2]  # an MLP


def products(hardware, configs, rows, **form):
    made, mlp = arithmetic(hardware, configs, **form)
    return made.products(mlp, rows, 1, first=True), 2 * rows * sum(
        w.numel for w in mlp.weights if len(w.shape) == 2
    )


def test_encoded_products_as_they_were_measured(host, configs):
    """Two matrices multiplied as they are kept up to 4 rows, and decoded beyond, where the last point says so."""
    hardware = host(encoded_products={"float32 int4": [[1, 2e8], [4, 8e8]]})
    for rows, rate in ((1, 2e8), (2, 4e8), (4, 8e8)):
        seconds, flops = products(hardware, configs, rows, codec="int4")
        assert seconds == pytest.approx(flops / rate, rel=1e-3)
    seconds, flops = products(hardware, configs, 5, codec="int4")
    decoded = flops / 10 * 4 / hardware.figure("decoding", "int4")
    assert seconds == pytest.approx(flops / hardware.product_rate("float32", 5) + decoded, rel=1e-3)
    assert products(hardware, configs, 5, codec="int8") == products(host(), configs, 5, codec="int8")


@pytest.mark.parametrize(("tier", "packed"), [("cpu", True), ("gpu", True), ("disk", False)])
def test_matrices_that_stay_are_laid_out_for_products(host, configs, tier, packed):
    hardware = host(packed_products={"float32": [[8, 4e9]]})
    seconds, flops = products(hardware, configs, 8, tier=tier)
    assert seconds == pytest.approx(flops / (4e9 if packed else 1e9), rel=1e-3)


def test_of_equal_layers_only_those_that_stay_are_laid_out(host, configs):
    """With three quarters of the weights on disk: between all in memory and all on disk."""
    spec, _ = open_model(configs["opt"], "dummy")
    deep, workload = replace(spec, layers=spec.layers[:1] * 8, max_positions=64), Workload(16, 4, 4)
    hardware = host(packed_products={"float32": [[8, 4e9]]})

    def computing(**weights):
        policy = Policy(gpu_batch_size=4, weights=weights)
        return sum(
            by_lane[COMPUTE] for by_lane in predict(deep, policy, hardware, workload).report.phases.values()
        )

    resident, streamed = computing(cpu=100), computing(disk=100)
    assert resident < 0.7 * streamed
    assert computing(cpu=25, disk=75) == pytest.approx((resident + 3 * streamed) / 4, rel=0.08)


def test_no_points_say_that_nothing_is_multiplied_as_it_is_kept(host, configs, tmp_path):
    hardware = host(encoded_products={"float32 int4": []})
    hardware.save(path := tmp_path / "machine.toml")
    assert Hardware.load(path) == hardware
    seconds, flops = products(hardware, configs, 1, codec="int4")
    decoded = flops / 2 * 4 / hardware.figure("decoding", "int4")
    assert seconds == pytest.approx(flops / hardware.product_rate("float32", 1) + decoded, rel=1e-3)


def test_decoding_by_dtype_where_that_is_known(machine):
    hardware = machine(decoding={"int4": 1.0, "float16 int4": 2.0})
    assert hardware.decoding_rate("float16", "int4") == 2.0
    assert hardware.decoding_rate("float32", "int4") == 1.0


def test_what_auto_computes_in(machine):
    points = [[8, 1e9]]
    hardware = machine(products={"float32": points, "float16": points}, computes_in={"float16": "float32"})
    assert hardware.dtype_for("float16") == "float32"
    assert hardware.dtype_for("bfloat16") == "float32"
    assert hardware.replace(computes_in={}).dtype_for("float16") == "float16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"interference": {"compute disk": 0.1}}, "unknown key 'compute disk' in interference"),
        ({"interference": {"compute disk_read": 1}}, "a lost share must be at least 0 and below 1"),
        ({"interference": {"compute disk_read": -0.1}}, "interference.compute disk_read is -0.1"),
        ({"prefill_interference": {"disk": 0.1}}, "unknown key 'disk' in prefill_interference"),
        ({"encoded_products": {"int4": [[1, 1]]}}, "unknown key 'int4' in encoded_products"),
        ({"packed_products": {"float32": [[2, 1], [1, 1]]}}, "write them in ascending order of rows"),
        (
            {"computes_in": {"float16": "bfloat16"}},
            "computes_in.float16 is 'bfloat16'; it must be one of products",
        ),
    ],
)
def test_mistakes_are_reported(changes, said, machine):
    with pytest.raises(HardwareError, match=said):
        machine(**changes)


def test_all_of_it_is_in_the_file(machine, tmp_path):
    hardware = machine(
        interference={"compute disk_read": 0.25, "disk_read compute": 0.125},
        prefill_interference={"compute disk_read": 0.5, "disk_read compute": 0.0},
        encoded_products={"float32 int4": [[1, 1e8], [16, 1e9]]},
        packed_products={"float32": [[1, 2e8]]},
        computes_in={"float16": "float32"},
    )
    hardware.save(path := tmp_path / "machine.toml")
    assert Hardware.load(path) == hardware
    assert Hardware.load(path).losses == {
        Phase.PREFILL: {(COMPUTE, READ): 0.5},
        Phase.DECODE: {(COMPUTE, READ): 0.25, (READ, COMPUTE): 0.125},
    }
    assert machine(prefill_interference={"compute disk_read": 0.0}).losses == {}
