"""The forms of weights that a search considers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quantized_checkpoints import FORMATS, save_quantized, tiny

from flexgen import Auto, Policy
from flexgen.models import open_model
from flexgen.policy import Tier
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict
from flexgen.search.choices import Choices
from flexgen.search.find import find_for_job
from flexgen.search.linear import Column
from flexgen.workload import Workload

WORKLOAD = Workload(8, 8, 4)


@pytest.mark.parametrize("quantized", [True, False])
def test_the_form_of_a_quantized_checkpoint_is_a_choice(
    quantized: bool, machine: Any, tmp_path: Path
) -> None:
    """Without `lossy`, because it rounds nothing. It is faster where the link is slow."""
    model = tiny("qwen3")
    if quantized:
        save_quantized(model, FORMATS["fp8 in blocks"], tmp_path)
    else:
        model.save_pretrained(tmp_path)
    spec, _ = open_model(tmp_path)
    job = Job.checked(spec, machine(), WORKLOAD)
    found = [column for column in Choices(job, Auto()).columns if column.codec == "stored"]
    assert found == [Column("weights", tier, "stored") for tier in Choices(job, Auto()).tiers if quantized]

    seconds = {}
    for codec in ("none", "stored"):
        weights = {"cpu": dict(percent=100, codec=codec)}
        policy = Policy(gpu_batch_size=4, weights=weights, cache={"gpu": 100}, activations={"gpu": 100})
        seconds[codec] = predict(spec, policy, machine(), WORKLOAD).report.total_s
    assert (seconds["stored"] < 0.6 * seconds["none"]) == quantized
    if quantized:
        fixed = dict(cache={"cpu": 100}, activations={"cpu": 100}, attend_on="cpu")
        little = machine(capacity={"gpu": "300KiB", "cpu": "4GiB", "disk": "4GiB"})
        policy = find_for_job(Job.checked(spec, little, WORKLOAD), Auto(fixed=fixed), top=1).best.policy
        used = {policy.weights[tier].codec for tier in Tier if policy.weights.percent(tier)}
        assert used == {"stored"}
