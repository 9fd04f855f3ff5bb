"""Jobs whose rows end early: their turnover compared with all of their passes, and the search with a grid."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen import Policy
from flexgen.errors import CapacityError
from flexgen.layout.passes import Passes
from flexgen.models import open_model
from flexgen.policy import Tier
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict, predict_job
from flexgen.predict.refilled_passes import refilled_passes
from flexgen.search.corners import Corners
from flexgen.search.find import find_policy
from flexgen.search.linear import Column
from flexgen.search.turnover import turnover
from flexgen.workload import Workload

COLUMNS = [Column("weights", Tier.CPU), Column("cache", Tier.CPU), Column("activations", Tier.GPU)]
SPLITS = {column.what: {column.tier: 100} for column in COLUMNS}


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


@given(
    size=st.sampled_from([4, 8, 24]),
    batches=st.integers(1, 9),
    blocks=st.sampled_from([1, 2.5, 4, 9]),
    gen_len=st.sampled_from([3, 20, 64, 200]),
    share=st.floats(0, 1),
)
def test_turnover_is_that_of_all_passes(size, batches, blocks, gen_len, share):
    policy = Policy(gpu_batch_size=size, num_gpu_batches=batches)
    mean = 1 + share * (gen_len - 1)
    workload = Workload(8, gen_len, round(blocks * policy.block_size), mean_new=mean)
    passes = list(refilled_passes(workload.answers(), policy, Passes(8)))
    decoding = [[token for token in one.tokens if token > 0] for one in passes]
    found = turnover(workload, policy)
    # One end of a batch is up to one answer early or late, in each of the blocks.
    apart = 3 + 0.2 * len(passes)
    assert found.passes == pytest.approx(sum(map(bool, decoding)), abs=apart)
    assert found.entering == pytest.approx(len(passes) - sum(map(bool, decoding)), abs=3 + 0.5 * blocks)
    assert found.cells == pytest.approx(sum(map(len, decoding)), abs=apart * batches)
    assert 0 <= found.token <= gen_len


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("mean", [1, 7, 24])
def test_lanes_of_a_program_are_the_predictions(batches, mean, opt, machine):
    """Weights are loaded once for the prompts that enter and the rows that decode. Batches that lose rows count as if
    they were whole."""
    workload = Workload(60, 24, 16 * batches, prefix=40, mean_new=mean)
    job = Job(opt, machine(), workload, torch.float32)
    policy = Policy(gpu_batch_size=4, num_gpu_batches=batches, attend_on="gpu", **SPLITS)
    figures = Corners(job).figures(policy, COLUMNS)
    prefill, decode = figures.seconds(dict.fromkeys(COLUMNS, 1.0))
    for lane, seconds in predict_job(job, policy).report.lanes.items():
        assert 4 * (prefill[lane] + decode[lane]) == pytest.approx(seconds, rel=0.3), lane


GRID = [{"gpu": a, "cpu": b, "disk": 100 - a - b} for a in range(0, 101, 50) for b in range(0, 101 - a, 50)]
SHAPES = (4, 4), (8, 2), (8, 4), (16, 1), (16, 4)
JOBS = {
    "short answers and a prefix": Workload(100, 24, 64, prefix=80, mean_new=6),
    "equal answers": Workload(40, 12, 48, mean_new=12),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_no_policy_of_a_grid_is_faster(job, opt, machine):
    """Both by the same prediction. 3%: the last steps of the search are of 1%, and the grid has other shapes."""
    hardware, workload = machine(capacity={"gpu": "200MiB", "cpu": "240MiB", "disk": "4GiB"}), JOBS[job]
    best = find_policy(opt, hardware, workload).best
    found = predict(opt, best.policy, hardware, workload, order=best.order).report.total_s
    assert found == best.prediction.report.total_s
    seconds = []
    for (size, batches), weights, attend_on in itertools.product(SHAPES, GRID, ("cpu", "gpu")):
        policy = Policy(
            gpu_batch_size=size, num_gpu_batches=batches, weights=weights, attend_on=attend_on,
            cache={"cpu": 100}, activations={"gpu": 100},
        )  # fmt: skip
        with contextlib.suppress(CapacityError):
            seconds.append(predict(opt, policy, hardware, workload).report.total_s)
    assert len(seconds) > 10
    assert found <= 1.03 * min(seconds)
