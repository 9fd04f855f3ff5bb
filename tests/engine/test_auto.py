"""`policy="auto"`: found when the model is opened, kept true to the calls that come; the flags of commands."""

import argparse
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from flexgen import Auto, OptLM, Policy, Workload, bench, simulate
from flexgen.cli.flags import add_policy_flags, read_policy
from flexgen.engine import auto
from flexgen.engine.auto import AutoPolicy, usual_workload
from flexgen.engine.completion import Completion
from flexgen.errors import CapacityError, PolicyError, RequestError
from flexgen.models import open_model
from flexgen.policy import Tier
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict_job
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS
from flexgen.units import GIB, MIB

CONFIG = OPTConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
    max_position_embeddings=256, word_embed_proj_dim=64, dtype="float32",
)  # fmt: skip
JOB = Workload(12, 6, 8)


def opened(policy="auto", workload=JOB, device="cpu", **more):
    return OptLM(CONFIG, policy, workload=workload, device=device, weights="dummy", progress=False, **more)


def prompts(count, length):
    return np.random.default_rng(0).integers(5, 96, size=(count, length))


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_policy_flags(parser)
    return read_policy(parser.parse_args(flags))


@pytest.fixture
def searches(monkeypatch):
    """The workloads that are searched for, and what was fixed."""
    seen = []
    find = auto.find_for_job

    def recorded(job, asked, **options):
        seen.append((job.workload, asked))
        return find(job, asked, **options)

    monkeypatch.setattr(auto, "find_for_job", recorded)
    return seen


@pytest.mark.parametrize("device", ["cpu", "emulated:memory=1MiB"])
def test_answers_are_those_of_any_policy(device):
    ids = prompts(8, 12)
    with opened(device=device) as model, opened(Policy()) as plain:
        found = model.generate(ids, 6, stop=())
        assert (found == plain.generate(ids, 6, stop=())).all()
        assert model.policy == model.stats.policy == model.auto.search.best.policy
        assert model.stats.order == model.auto.search.best.order


def test_an_order_that_is_not_the_policys_own_is_run(monkeypatch):
    find = auto.find_for_job

    def in_normal_order(job, asked):
        return find(dataclasses.replace(job, order="normal"), asked)

    monkeypatch.setattr(auto, "find_for_job", in_normal_order)
    with opened(policy=Auto({"overlap": True})) as model:
        model.generate(prompts(8, 12), 6, stop=())
        assert model.policy.overlap and model.stats.order == "normal"


def test_a_tier_that_may_not_be_used_is_not():
    with opened(max_memory={Tier.DISK: 0}) as model:
        model.generate(prompts(8, 12), 6, stop=())
        assert model.stats.plan.on(Tier.DISK) == 0


def test_files_that_are_there_take_none_of_what_is_free(tmp_path, monkeypatch):
    """Weights that are read in place from the checkpoint, and those that an earlier run wrote."""
    model, offload = tmp_path / "model", tmp_path / "offload"
    OPTForCausalLM(CONFIG).save_pretrained(model)
    nbytes = (model / "model.safetensors").stat().st_size

    def opened_with(free, **options):
        few = Auto({"weights": {"disk": 100}})
        monkeypatch.setattr(
            "flexgen.engine.opening.this_machine",
            lambda *_: small.replace(capacity={"cpu": GIB, "disk": free}),
        )
        with OptLM(
            model, few, workload=JOB, device="cpu", progress=False, offload_dir=offload, **options
        ) as lm:
            return lm.generate(prompts(8, 12), 6, stop=()).shape

    small = auto.this_machine("cpu", None)
    assert opened_with(MIB) == (8, 18)
    with pytest.raises(CapacityError, match="disk"):
        opened_with(nbytes // 4, dtype="bfloat16")
    assert opened_with(nbytes, dtype="bfloat16") == (8, 18)  # writes them
    assert opened_with(nbytes // 4, dtype="bfloat16") == (8, 18)


def test_what_was_chosen_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="flexgen"), opened() as model:
        (record,) = (r for r in caplog.records if r.name == "flexgen")
    assert record.getMessage() == auto.in_words(model.auto.search) and "\n" not in record.getMessage()


def test_given_fields_stay(searches):
    fixed = {"weights": {"cpu": 50, "disk": 50}, "gpu_batch_size": 2}
    with opened(Auto(fixed)) as model:
        assert (model.policy.gpu_batch_size, model.policy.weights.percent("disk")) == (2, 50)
    assert searches == [(JOB, Auto(fixed))]


def test_the_order_that_is_asked_for_stays():
    with opened(order="normal") as model:
        model.generate(prompts(8, 12), 2, stop=())
        assert model.stats.order == "normal"


def test_without_a_workload_the_usual_one_as_far_as_positions_reach():
    spec, _ = open_model(CONFIG, "dummy")
    usual = usual_workload(spec)
    assert usual.capacity == spec.max_positions and usual.gen_len == auto.USUAL.gen_len
    with opened(workload=None) as model:
        assert model.auto.job.workload == usual
    assert usual_workload(open_model("opt-125m", "dummy")[0]) == auto.USUAL


def test_calls_like_the_planned_one_are_not_searched_for(searches):
    with opened() as model:
        for count, length, tokens in ((8, 12, 6), (50, 10, 6), (1, 1, 1), (9, 24, 7)):
            model.generate(prompts(count, length), tokens, stop=())
            assert model.stats.policy == model.policy
    assert len(searches) == 1


def test_an_unlike_call_is_searched_for_once_with_the_weights_where_they_are(searches):
    ids = prompts(8, 60)
    fixed = {"weights": {"cpu": 40, "disk": 60}}
    with opened(Auto(fixed, worth=0), Workload(4, 2, 1)) as model, opened(Policy()) as plain:
        assert model.policy.block_size == 1
        expected = plain.generate(ids, 6, stop=())
        for _ in range(2):
            assert (model.generate(ids, 6, stop=()) == expected).all()
        assert model.stats.policy.block_size > 1  # the policy of the call, not of the opening
        assert model.stats.policy.weights == model.policy.weights
        assert sum(model.lane_seconds(ids, 6)[phase] != {} for phase in ("prefill", "decode")) == 2
        assert model.forward(ids).shape == (8, 60, 96)
    called = [workload for workload, _ in searches]
    assert called[:2] == [Workload(4, 2, 1), Workload(60, 6, 8)] and called.count(Workload(60, 6, 8)) == 1
    kept = searches[1][1].fixed
    assert kept["weights"] == model.policy.weights and kept["sep_layer"] == model.policy.sep_layer


def test_a_search_for_a_call_knows_how_long_its_answers_are(searches):
    """From the numbers of new tokens, if there is one for each prompt; otherwise from the job, at most `gen_len`."""
    counts = [8] * 6 + [2] * 2
    with opened(Auto(worth=0), Workload(4, 30, 1, mean_new=7.0)) as model:
        for most in (counts, 8, 5):
            model.generate(prompts(8, 60), most, stop=())
    called = [workload for workload, _ in searches[1:]]
    assert [workload.gen_len for workload in called] == [8, 8, 5]
    assert [workload.mean_new for workload in called] == [6.5, 7, 5]


def test_once_holds_for_every_call(searches, monkeypatch):
    with opened(Auto({"cache": {"cpu": 100}}, once=True, worth=0), Workload(4, 2, 1)) as model:
        model.generate(ids := prompts(8, 60), 6, stop=())
        assert model.stats.policy == model.policy and model.policy.block_size == 1
        # Nor does it take a shape that fits: what was the same every time would not be.
        limits = {Tier.GPU: None, Tier.CPU: 1000, Tier.DISK: None}
        monkeypatch.setattr(type(model._machine), "limits", lambda self: limits)
        with pytest.raises(CapacityError, match="cpu tier, which has 1000 B"):
            model.generate(ids, 6, stop=())
    assert [workload for workload, _ in searches] == [Workload(4, 2, 1)]


def test_an_order_that_wants_more_slots_is_not_taken(monkeypatch, nothing_is_measured):
    """Opened with two of each, a call whose policy asks for more is given another order."""
    spec, _ = open_model(CONFIG, "dummy")
    hardware = nothing_is_measured("emulated:memory=1GiB")
    small = Auto({"cache": {"gpu": 100}, "weights": {"cpu": 100}, "sep_layer": False}, worth=0)
    chooser = AutoPolicy(small, Job.checked(spec, hardware, Workload(4, 2, 1)))
    chooser.opened = auto.Chosen(chooser.opened.policy, "overlap_single_batch")
    taken = []

    def greedy(job, asked, **_):
        policy = Policy(**{**asked.fixed, "gpu_batch_size": 2, "num_gpu_batches": 4, "cache": {"cpu": 100}})
        report = predict_job(job, policy).report
        taken.append(report.order)
        candidate = argparse.Namespace(policy=policy, order=report.order)
        return argparse.Namespace(best=candidate, line=lambda: "greedy", considered=1, seconds=0.0)

    monkeypatch.setattr(auto, "find_for_job", greedy)
    chosen = chooser.for_call(Workload(60, 6, 8), lambda policy: True)
    assert taken == ["overlap_cpu_attention", "overlap_multi_batch"]
    assert chosen.order == "overlap_multi_batch" and chosen.policy.num_gpu_batches == 4
    assert ORDERS[chosen.order].slots == ORDERS["overlap_single_batch"].slots


def test_a_call_that_does_not_fit_takes_fewer_prompts_at_once(monkeypatch):
    """Where no search finds anything either."""
    ids = prompts(8, 40)
    with opened(Auto({"gpu_batch_size": 8, "num_gpu_batches": 1})) as model, opened(Policy()) as plain:
        expected = plain.generate(ids, 6, stop=())
        two = model._plans._plan_of(Workload(40, 6, 8))(model.policy.replace(gpu_batch_size=2))
        limits = {Tier.GPU: None, Tier.CPU: two.on(Tier.CPU), Tier.DISK: None}
        monkeypatch.setattr(type(model._machine), "limits", lambda self: limits)

        def nothing(*args, **kwargs):
            raise CapacityError("nothing fits")

        monkeypatch.setattr(auto, "find_for_job", nothing)
        assert (model.generate(ids, 6, stop=()) == expected).all()
        assert model.stats.policy == model.policy.replace(gpu_batch_size=2)
        limits[Tier.CPU] = 1000
        with pytest.raises(CapacityError, match="cpu tier, which has 1000 B"):
            model.generate(ids, 6, stop=())


def test_whole_batches_of_prompts_may_need_smaller_batches_than_prompts_that_enter_at_a_rate(monkeypatch):
    ids, fixed = prompts(8, 40), {"gpu_batch_size": 8, "num_gpu_batches": 1, "prefill_rows": 1}
    with opened(
        Auto(fixed | {"activations": {"gpu": 100}, "cache": {"cpu": 100}}), device="emulated"
    ) as model:
        plan = model._plans._plan_of(Workload(40, 6, 8))
        most = plan(model.policy).on(Tier.GPU)
        assert plan(model.policy.replace(prefill_rows=0, prefill_chunk=32)).on(Tier.GPU) > most
        limits = {Tier.GPU: most, Tier.CPU: None, Tier.DISK: None}
        monkeypatch.setattr(type(model._machine), "limits", lambda self: limits)
        assert all(model.lane_seconds(ids, 6).values())  # it times whole batches
        model.generate(ids, 6, stop=())
        assert model.stats.policy == model.policy


def test_a_call_in_one_block_takes_smaller_batches_where_it_must(monkeypatch):
    ids = prompts(8, 40)
    given = Auto({"gpu_batch_size": 8, "num_gpu_batches": 1, "cache": {"cpu": 100}})
    with opened(given, Workload(40, 6, 8)) as model:
        expected = model.generate(ids, 6, stop=())
        request, choice = read_request(model.spec, ids), model.sampled(stop=())
        choice.whole_call = True
        assert (model.generate_with(Completion(request, 6, choice)) == expected).all()
        assert model.stats.policy == model.policy
        limits = {Tier.GPU: None, Tier.CPU: model.stats.plan.on(Tier.CPU) - 1, Tier.DISK: None}
        monkeypatch.setattr(type(model._machine), "limits", lambda self: limits)
        assert (model.generate_with(Completion(request, 6, choice)) == expected).all()
        assert model.stats.policy == model.policy.replace(gpu_batch_size=4, num_gpu_batches=2)
        assert model.stats.plan.on(Tier.CPU) <= limits[Tier.CPU]


def test_hidden_states_that_do_not_fit_take_fewer_prompts_at_once(monkeypatch):
    with opened() as model:
        request = read_request(model.spec, prompts(8, 12))
        whole = model.forward_with(request, hidden_states=True)
        taken, policy = model.stats.plan.on(Tier.CPU), model.stats.policy
        held = dict.fromkeys(Tier) | {Tier.CPU: taken - 1}
        monkeypatch.setattr(type(model._machine), "limits", lambda self: held)
        fewer = model.forward_with(request, hidden_states=True)
        assert model.stats.policy.block_size < policy.block_size
        assert "hidden states" in {need.what for need in model.stats.plan.needs}
    for ours, theirs in zip(fewer.hidden, whole.hidden, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_served_is_refused_as_ever():
    with pytest.raises(RequestError, match="exceed the 256 positions"):
        opened(workload=Workload(250, 20, 1))
    with pytest.raises(CapacityError, match="gpu tier"):
        opened(device="emulated:memory=4KiB")
    with pytest.raises(PolicyError, match="110 percent"):
        Auto({"weights": {"gpu": 50, "cpu": 60}})
    with pytest.raises(PolicyError, match="unknown key 'weight'.*did you mean 'weights'"):
        Auto({"weight": {"gpu": 100}})


def test_flags_are_what_auto_keeps(tmp_path):
    assert parsed() == Auto() == parsed("--policy", "auto")
    assert parsed("--lossy").lossy
    with pytest.raises(
        PolicyError, match="--lossy lets the search choose codecs, but these flags leave nothing"
    ):
        parsed(*"--percent 10 90 0 100 100 0 --gpu-batch-size 4 --num-gpu-batches 2 --lossy".split())
    given = parsed("--percent", "10", "90", "0", "100", "100", "0", "--overlap", "no")
    assert given == Auto({"weights": {"gpu": 10, "cpu": 90}, "cache": {"cpu": 100}, "activations": {"gpu": 100},
                          "overlap": False})  # fmt: skip
    whole = parsed(*"--percent 10 90 0 100 100 0 --gpu-batch-size 4 --num-gpu-batches 2".split())
    assert isinstance(whole, Policy) and whole.block_size == 8
    Policy(gpu_batch_size=3).save(path := tmp_path / "policy.toml")
    assert parsed("--policy", str(path), "--num-gpu-batches", "5") == Policy(
        gpu_batch_size=3, num_gpu_batches=5
    )


def test_bench_prints_the_chosen_policy_and_the_prediction(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    out = tmp_path / "out.jsonl"
    flags = ["--model", str(tmp_path), "--weights", "dummy", "--device", "cpu", "--prompt-len", "6"]
    flags += ["--gen-len", "4", "--num-prompts", "5", "--json", str(out), "--no-bound"]
    assert bench.main(flags) == 0
    text = capsys.readouterr()
    assert text.err.count("policy:") == 1 and "searched" in text.err
    found = json.loads(out.read_text())
    assert found["predicted"]["throughput_tokens_s"] == pytest.approx(20 / found["predicted"]["total_s"])
    assert f"predicted {found['predicted']['throughput_tokens_s']:,.1f} tokens/s" in text.out
    assert "\nroofline " in text.out and found["goal_share"] == found["roofline_share"] > 0
    # A whole policy on a machine that was not measured: nothing is searched for, nothing predicted,
    whole = [*flags, *"--percent 100 0 100 0 100 0 --gpu-batch-size 5 --num-gpu-batches 1".split()]
    assert bench.main(whole) == 0
    text = capsys.readouterr()
    assert not text.err and "predicted" not in text.out
    # unless it is asked for.
    assert bench.main([*whole, "--predict"]) == 0
    assert "predicted" in capsys.readouterr().out
    assert [json.loads(line)["predicted"] is None for line in out.read_text().splitlines()] == [
        False,
        True,
        False,
    ]


def test_simulate_searches_too(capsys):
    flags = "--model opt-125m --hardware t4 --prompt-len 32 --gen-len 4 --num-prompts 8 --json -"
    assert simulate.main(flags.split()) == 0
    text = capsys.readouterr()
    assert "searched" in text.err
    found = json.loads(text.out)
    assert found["num_prompts"] == 8 and found["policy"]["gpu_batch_size"] > 1
