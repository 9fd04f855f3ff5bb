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
from flexgen.search.moves import moves
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


def _choices(machine: Any, workload: Workload, **fixed: Any) -> Choices:
    spec, _ = open_model("opt-125m", "dummy")
    return Choices(Job.checked(spec, machine, workload), Auto(fixed))


def test_prompts_may_enter_at_a_rate_on_machines_with_a_link(machine: Any, host: Any) -> None:
    """Never with what the policy refuses."""
    equal, short = Workload(40, 16, 64), Workload(40, 16, 64, mean_new=4)

    def rates(on: Any, workload: Workload, **fixed: Any) -> set[int]:
        return {form.prefill_rows for form in _choices(on, workload, **fixed).forms()}

    assert rates(machine(), equal) == rates(machine(), short) == {0, 1}
    assert rates(host(), equal) == rates(host(), short) == {0}
    for fixed in (
        {"prefill_rows": 0},
        {"cache": {"disk": 100}},
        {"activations": {"cpu": 100}},
        {"guess": 2},
        {"prefill_chunk": 8},
        {"attn_sparsity": 0.5, "cache": {"cpu": 100}},
    ):
        assert rates(machine(), short, **fixed) == {0}
    assert rates(machine(), short, prefill_rows=3) == {3}


def test_the_rate_is_that_at_which_rows_end(machine: Any) -> None:
    choices = _choices(machine(), Workload(40, 16, 640, mean_new=4))
    entering = Policy(prefill_rows=1)
    assert choices.shaped(entering, 8, 5).prefill_rows == 10
    assert choices.shaped(entering, 1, 2).prefill_rows == 1
    assert choices.shaped(Policy(), 8, 5).prefill_rows == 0
    assert choices.shaped(entering, 8, 40) and not choices.shaped(entering, 8, 41)  # two blocks, and less
    assert not list(choices.rates(Policy()))
    given = _choices(machine(), Workload(40, 16, 640), prefill_rows=3)
    assert given.shaped(Policy(prefill_rows=3), 8, 5).prefill_rows == 3
    assert not list(given.rates(Policy(prefill_rows=3)))


@pytest.mark.parametrize(("places", "rates"), [(16, [6, 10, 12]), (11, [6, 10, 11]), (10, [6, 10]), (8, [6])])
def test_other_rates_are_at_most_the_number_of_places(places: int, rates: list[int], machine: Any) -> None:
    """With a larger number, as many prompts enter, so a search would predict the same again."""
    workload = Workload(40, 16, 64, mean_new=4)
    choices, policy = _choices(machine(), workload), Policy(gpu_batch_size=places, prefill_rows=8)
    assert [near.prefill_rows for near in choices.rates(policy)] == rates
    spec, _ = open_model("opt-125m", "dummy")
    full, more = (
        predict(spec, policy.replace(prefill_rows=n, activations={"gpu": 100}), machine(), workload)
        for n in (places, 2 * places)
    )
    assert full.report.total_s == more.report.total_s
    assert full.plan.by_tier == more.plan.by_tier


def test_rows_may_close_up_on_machines_without_a_link(machine: Any, host: Any) -> None:
    short, policy = Workload(40, 16, 64, mean_new=4), Policy(gpu_batch_size=8, num_gpu_batches=2)

    def shapes(
        on: Any, workload: Workload, policy: Policy = policy, **fixed: Any
    ) -> set[tuple[int, int, int]]:
        some = _choices(on, workload, **fixed).closing_up(policy)
        return {(one.gpu_batch_size, one.num_gpu_batches, one.prefill_rows) for one in some}

    assert shapes(host(), short) == {(n, 1, n) for n in (16, 32, 64)}
    assert not shapes(machine(), short)
    assert not shapes(host(), Workload(40, 16, 64)), "all rows end together"
    for fixed in ({"prefill_rows": 0}, {"gpu_batch_size": 8}, {"guess": 2}, {"activations": {"cpu": 100}}):
        assert not shapes(host(), short, policy.replace(**fixed), **fixed)
    for cache in ({"cpu": 50, "gpu": 50}, {"cpu": 50, "disk": 50}):
        assert not shapes(host(), short, policy.replace(cache=cache))


def test_places_for_whole_numbers_of_rows_that_end(machine: Any) -> None:
    choices = _choices(machine(), Workload(40, 16, 640, mean_new=4))
    near = list(choices.places(Policy(gpu_batch_size=10, num_gpu_batches=2, prefill_rows=5)))
    assert [(form.gpu_batch_size, form.prefill_rows) for form in near] == [(8, 4), (12, 6), (14, 7)]
    most = choices.places(Policy(gpu_batch_size=158, num_gpu_batches=2, prefill_rows=79))
    assert [form.block_size for form in most] == [312, 320], "the job has at least two blocks"
    assert not list(choices.places(Policy(gpu_batch_size=10)))
    for given in ({"prefill_rows": 5}, {"gpu_batch_size": 10}):
        fixed = _choices(machine(), Workload(40, 16, 640), **given)
        assert not list(fixed.places(Policy(gpu_batch_size=10, num_gpu_batches=2, prefill_rows=5)))


def test_places_that_the_policy_refuses_are_no_choice(machine: Any) -> None:
    choices = _choices(machine(), Workload(40, 16, 64))
    entering = Policy(gpu_batch_size=4, prefill_rows=2)

    def tiers(form: Policy, what: str) -> set[Tier]:
        return {column.tier for column in choices.columns_of(form) if column.what == what}

    assert tiers(Policy(), "cache") == tiers(Policy(), "activations") == set(Tier)
    assert tiers(entering, "weights") == set(Tier)
    assert (tiers(entering, "cache"), tiers(entering, "activations")) == ({Tier.GPU, Tier.CPU}, {Tier.GPU})
    moved = list(moves(entering, 20.0, choices.tiers, ()))  # `Policy` would raise an error
    assert {policy.activations for policy in moved} == {entering.activations}
    assert len({policy.cache for policy in moved}) > 1
