"""Figures corrected by runs: lanes that are predicted with them take what was seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.models import open_model
from flexgen.policy import Policy
from flexgen.predict.prediction import predict
from flexgen.results.trace import LaneName, Phase
from flexgen.tuning.correct import MOST, Seen, corrected
from flexgen.workload import Workload

JOB = Workload(20, 5, 8)
POLICIES = {
    "weights from disk": Policy(gpu_batch_size=8, weights={"disk": 100}, cache={"cpu": 100}),
    "the host attends": Policy(gpu_batch_size=4, num_gpu_batches=2, weights={"cpu": 100}, cache={"cpu": 100},
                               sep_layer=False),
    "codecs": Policy(gpu_batch_size=8, weights={"cpu": {"percent": 100, "codec": "int4"}},
                     cache={"gpu": {"percent": 100, "codec": "int8"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(configs):
    return open_model(configs["opt"], "dummy")[0]


def seen(spec, policy, guess, truth, job=JOB):
    """A run on the machine `truth`, predicted with `guess`."""
    measured, predicted = (predict(spec, policy, hardware, job).report.phases for hardware in (truth, guess))
    return Seen(policy, "float32", job.prompt_len, measured, predicted)


def scaled(hardware, factors, products):
    """Rates multiplied with `factors`, by table; of products with (few rows, many rows)."""
    few, many = products
    points = [[1, 1e8 * few], [8, 1e9 * few], [100, 1e9 * many], [1000, 1e9 * many]]
    changes = {
        table: {key: rate * factors[table] for key, rate in getattr(hardware, table).items()}
        for table in ("bandwidth", "prefill_attention", "device_attention", "host_attention", "decoding")
    }
    return hardware.replace(**changes, products={"float32": points})


ONES = dict.fromkeys(
    ("bandwidth", "prefill_attention", "device_attention", "host_attention", "decoding"), 1.0
)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@settings(max_examples=8)
@given(few=st.floats(0.3, 3), many=st.floats(0.3, 3), moved=st.floats(0.3, 3), shared=st.booleans())
def test_lanes_then_take_what_was_seen(policy, few, many, moved, shared, spec, machine, host):
    """Computations and transfers that are slower or faster as a whole than predicted."""
    if policy is POLICIES["codecs"]:
        many = few  # products with encoded matrices are inferred from the rate at many rows, so the two are equal
    guess = scaled(host() if shared else machine(), ONES, (1, 1))
    attending = {"prefill_attention": many, "device_attention": few, "host_attention": few}
    truth = scaled(guess, {"bandwidth": moved, "decoding": 1.0} | attending, (few, many))
    run = seen(spec, policy, guess, truth)
    again = predict(spec, policy, corrected(guess, [run]), JOB).report.phases
    for phase, lanes in run.measured.items():
        longest = max(lanes.values())
        off = {n: abs(again[phase][n] - lanes[n]) / longest for n in lanes}
        before = {n: abs(run.predicted[phase][n] - lanes[n]) / longest for n in lanes}
        assert sum(off.values()) < 0.25 * sum(before.values()) + 0.1, (phase, off, before)


def test_a_perfect_guess_stays(spec, machine):
    guess = machine()
    assert corrected(
        guess, [seen(spec, policy, guess, guess) for policy in POLICIES.values()]
    ) == guess.replace(
        products=corrected(guess, [seen(spec, p, guess, guess) for p in POLICIES.values()]).products
    )
    same = corrected(guess, [seen(spec, POLICIES["codecs"], guess, guess)])
    for rows in (1, 3, 8, 20, 160, 5000):
        assert same.product_rate("float32", rows) == pytest.approx(guess.product_rate("float32", rows))


def test_the_disk_alone_was_slower(spec, machine):
    start = {LaneName.DISK_READ: 1e-3, LaneName.COMPUTE: 2e-3}
    guess = machine(fixed={}, start=start, busy_start=start)
    truth = guess.replace(bandwidth={**guess.bandwidth, LaneName.DISK_READ: 2e5})
    better = corrected(guess, [seen(spec, POLICIES["weights from disk"], guess, truth)])
    assert better.bandwidth[LaneName.DISK_READ] == pytest.approx(2e5, rel=1e-6)
    assert {k: v for k, v in better.bandwidth.items() if k is not LaneName.DISK_READ} == {
        k: v for k, v in guess.bandwidth.items() if k is not LaneName.DISK_READ
    }
    slower = {LaneName.DISK_READ: 2.5e-3, LaneName.COMPUTE: 2e-3}
    assert better.start == better.busy_start == pytest.approx(slower, rel=1e-6)
    assert better.device_attention == guess.device_attention


def test_products_are_changed_at_the_rows_that_were_seen(machine):
    guess = machine(products={"float32": [[8, 1e9]], "float16": [[8, 2e9]]})
    lanes = {phase: {LaneName.COMPUTE: 1.0} for phase in Phase}
    took = {Phase.PREFILL: {LaneName.COMPUTE: 2.0}, Phase.DECODE: {LaneName.COMPUTE: 0.5}}
    better = corrected(guess, [Seen(Policy(gpu_batch_size=4), "float32", 100, took, lanes)])
    assert better.product_rate("float32", 4) == pytest.approx(2 * guess.product_rate("float32", 4))
    assert better.product_rate("float32", 400) == pytest.approx(guess.product_rate("float32", 400) / 2)
    assert better.product_rate("float32", 40) == pytest.approx(guess.product_rate("float32", 40))
    assert better.product_rate("float32", 1) == pytest.approx(2 * guess.product_rate("float32", 1))
    assert better.products["float16"] == guess.products["float16"]
    assert better.fixed.cell == pytest.approx(guess.fixed.cell / 2)
    assert better.prefill_attention["float32"] == pytest.approx(guess.prefill_attention["float32"] / 2)


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_host_and_device_that_share_cores_are_timed_together(slower, machine):
    """As `emulated` is: a run counts what the host attends as computed, a prediction has it apart."""
    guess = machine()
    policy = Policy(gpu_batch_size=4, weights={"cpu": 100}, cache={"cpu": 100})
    lanes = {phase: {LaneName.COMPUTE: 1.0, LaneName.HOST: 3.0} for phase in Phase}
    took = {phase: {LaneName.COMPUTE: 4.0 * slower} for phase in Phase}
    better = corrected(guess, [Seen(policy, "float32", 100, took, lanes)])
    for rows in (4, 400):
        assert better.product_rate("float32", rows) == pytest.approx(
            guess.product_rate("float32", rows) / slower
        )
    assert better.host_attention["float32"] == pytest.approx(guess.host_attention["float32"] / slower)
    assert better.device_attention == guess.device_attention


def test_what_says_little_is_not_believed(machine):
    guess = machine()
    lanes = {LaneName.COMPUTE: 1.0, LaneName.TO_DEVICE: 0.01, LaneName.DISK_READ: 0.5}
    took = {LaneName.COMPUTE: 1.0, LaneName.TO_DEVICE: 0.04, LaneName.DISK_READ: 50.0}
    better = corrected(guess, [Seen(Policy(), "float32", 4, {Phase.DECODE: took}, {Phase.DECODE: lanes})])
    assert better.bandwidth[LaneName.TO_DEVICE] == guess.bandwidth[LaneName.TO_DEVICE]
    assert better.bandwidth[LaneName.DISK_READ] == pytest.approx(guess.bandwidth[LaneName.DISK_READ] / MOST)
    assert np.isclose(better.product_rate("float32", 1), guess.product_rate("float32", 1), rtol=1e-9)
    assert corrected(guess, []) == guess
