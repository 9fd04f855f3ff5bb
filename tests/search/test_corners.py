"""The figures of a linear program."""

import numpy as np
import pytest
import torch

from flexgen import Policy
from flexgen.models import open_model
from flexgen.policy import Tier
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict_job
from flexgen.results.trace import LaneName
from flexgen.search.corners import Corners
from flexgen.search.linear import CLASSES, Column, blocks
from flexgen.workload import Workload

CODED = [Column("weights", Tier.CPU, "int4"), Column("cache", Tier.CPU, "int8")]
COLUMNS = [*(Column(what, tier) for what in CLASSES for tier in Tier), *CODED]


@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("batches", [1, 3])
def test_a_step_that_does_not_depend_on_a_class_takes_the_same(attend_on, batches, configs, machine):
    """Corners share the steps that do not depend on what they change; one that is alone shares none."""
    spec, _ = open_model(configs["opt"], "dummy")
    job = Job(spec, machine(), Workload(40, 6, 8), torch.float32)
    form = Policy(
        gpu_batch_size=2, num_gpu_batches=batches, attend_on=attend_on, sep_layer=attend_on == "gpu"
    )
    figures = Corners(job).figures(form, COLUMNS)
    start = {column.what: column for column in reversed(COLUMNS)}
    for column in COLUMNS:
        at = (start | {column.what: column}).values()
        alone = Corners(job).figures(form, list(at)).base
        assert np.allclose(figures.at(dict.fromkeys(at, 1.0)), alone, rtol=1e-9, atol=1e-12), column


@pytest.mark.parametrize(("cuts", "groups"), [((), 1), ((40,), 1), ((40,), 2), ((), 2)])
@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("cache", [Tier.GPU, Tier.CPU])
def test_seconds_include_the_blocks_of_a_prefix(cache, blocks, cuts, groups, configs, machine):
    """The seconds of each lane, times the number of blocks, are those of the prediction of the whole job."""
    spec, _ = open_model(configs["opt"], "dummy")
    workload = Workload(90, 3, 4 * blocks, prefix=80, cuts=cuts, groups=groups)
    job = Job(spec, machine(), workload, torch.float32)
    columns = [Column("weights", Tier.CPU), Column("cache", cache), Column("activations", Tier.GPU)]
    split = {column.what: {column.tier: 100} for column in columns}
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, attend_on="gpu", **split)
    figures = Corners(job).figures(policy, columns)
    seconds = figures.seconds(dict.fromkeys(columns, 1.0))
    for of_phase, predicted in zip(seconds, predict_job(job, policy).report.phases.values(), strict=True):
        for lane, alone in predicted.items():
            assert of_phase[lane] * blocks == pytest.approx(alone, rel=1e-6), lane


@pytest.mark.parametrize("batches", [1, 2])
def test_prompts_that_enter_at_a_rate_are_costed_in_their_cells(batches, configs, machine):
    """Products with few rows are slow here: two prompts in a cell take about four times as long as in a batch."""
    spec, _ = open_model(configs["opt"], "dummy")
    hardware = machine(products={"float32": [[128, 1e8], [1024, 8e8]]}, host_attention={"float32": 1e9})
    job = Job(spec, hardware, Workload(64, 9, 256), torch.float32)
    columns = [Column("weights", Tier.CPU), Column("cache", Tier.CPU), Column("activations", Tier.GPU)]
    split = {column.what: {column.tier: 100} for column in columns}
    policy = Policy(
        gpu_batch_size=16 // batches, num_gpu_batches=batches, attend_on="cpu", sep_layer=False, prefill_rows=2,
        **split,
    )  # fmt: skip
    figures = Corners(job).figures(policy, columns)
    seconds = figures.seconds(dict.fromkeys(columns, 1.0))
    predicted = predict_job(job, policy).report.phases.values()
    for lane in (LaneName.COMPUTE, LaneName.HOST):
        total = sum(of_phase[lane] for of_phase in seconds) * blocks(job.workload, policy)
        assert total == pytest.approx(sum(alone[lane] for alone in predicted), rel=0.1), lane
