"""Tuning: candidates are tried, they correct the machine's figures, and the best one is written."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexgen import bench, tune
from flexgen.errors import CapacityError
from flexgen.models import open_model
from flexgen.policy import Policy
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.results.trace import LaneName, Phase
from flexgen.search.find import find_for_job
from flexgen.tuning import rounds as tuning
from flexgen.tuning.trial import predicted_trial, run_trial, shape_for, shapes
from flexgen.workload import Workload

CONFIG = dict(
    model_type="opt", vocab_size=96, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, ffn_dim=128,
    max_position_embeddings=256, word_embed_proj_dim=64, dtype="float32",
)  # fmt: skip
_FOUND = {}
JOB = "--prompt-len 8 --gen-len 6 --num-prompts 8 --trial-seconds 0.01"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return str(directory)


def remembered(*asked_for):
    """What a search finds, which is the same each time; most tests here search for the same job."""
    asked = repr(asked_for)
    if asked not in _FOUND:
        _FOUND[asked] = find_for_job(*asked_for)
    return _FOUND[asked]


@pytest.fixture
def trials(monkeypatch):
    """Trials that run nothing: a machine that takes twice as long as predicted, each lane of it too. `fails` are
    policies that do not run; `slow` those that take ten times as long."""
    trials = SimpleNamespace(runs=[], fails=lambda policy: False, slow=lambda policy: False)

    def run(opening, policy, order, shape, lanes, seed):
        if trials.fails(policy):
            raise CapacityError("it needs more than there is")
        trials.runs.append((policy, shape, lanes))
        spec, _ = open_model(opening["model"], "dummy")
        report = predicted_trial(
            Job.checked(spec, trials.hardware(opening["device"]), shape.workload, order=order), policy, shape
        )
        times = 20.0 if trials.slow(policy) else 2.0
        phases = {
            phase: {lane: times * n for lane, n in by_lane.items()}
            for phase, by_lane in report.phases.items()
        }
        return replace(
            report, prefill_s=times * report.prefill_s, decode_s=times * report.decode_s,
            phases=phases if lanes else {},
        )  # fmt: skip

    monkeypatch.setattr(tuning, "run_trial", run)
    monkeypatch.setattr(tuning, "find_for_job", remembered)
    return trials


@pytest.fixture
def tuned(tiny, trials, nothing_is_measured, tmp_path):
    """Run the command; returns the exit status, the policy file and the contents of --json."""
    trials.hardware = nothing_is_measured

    def run(more="", status=0):
        out, figures = tmp_path / "policy.toml", tmp_path / "out.jsonl"
        flags = f"--model {tiny} --weights dummy --device cpu {JOB} -o {out} --json {figures} {more}"
        assert tune.main(flags.split()) == status
        return out, json.loads(figures.read_text()) if figures.exists() else {}

    return run


def test_the_best_is_written_with_where_it_came_from(tuned, trials, capsys):
    out, found = tuned("--top 2 --rounds 1 --repeats 3")
    policy = Policy.load(out)
    assert policy.to_dict() == found["policy"]
    comment = [line[2:] for line in out.read_text().splitlines() if line.startswith("# ")]
    text = "\n".join(comment)
    assert "Found by python -m flexgen.tune on 2" in text and "made up, cpu" in text
    assert "8 prompts of 8 tokens, 6 new tokens each" in text
    rates = [float(rate.replace(",", "")) for rate in re.findall(r": ([\d,.]+) tokens/s", text)]
    predicted, measured = rates
    assert measured == pytest.approx(predicted / 2, rel=0.01)  # the machine was half as fast
    best = max(found["tried"], key=lambda one: one["measured_tokens_s"])
    assert best["policy"] == policy.to_dict()
    (command,) = re.findall("Run it: python -m flexgen.bench (.*)", text)
    asked = bench.make_parser().parse_args(command.split())
    assert (asked.policy, asked.weights, asked.device) == (str(out), "dummy", "cpu")
    assert (asked.prompt_len, asked.gen_len, asked.num_prompts) == (8, 6, 8)
    assert f"written to {out}" in capsys.readouterr().out
    # Interleaved: every candidate once, then all of them again; lanes are timed in the first round only.
    tried = [one["policy"] for one in found["tried"]]
    assert [run[0].to_dict() for run in trials.runs] == 3 * tried and len(tried) == 2
    assert [lanes for _, _, lanes in trials.runs] == [True, True, False, False, False, False]


def test_figures_are_corrected_by_measured_times(tuned, nothing_is_measured, tmp_path):
    _, found = tuned(f"--top 1 --rounds 1 --repeats 1 --save-hardware {tmp_path / 'machine.toml'}")
    before, after = nothing_is_measured("cpu"), Hardware.load(tmp_path / "machine.toml")
    assert after.to_dict() == found["hardware"]
    assert after.product_rate("float32", 4) == pytest.approx(before.product_rate("float32", 4) / 2, rel=1e-3)
    assert after.fixed.cell == pytest.approx(2 * before.fixed.cell)


def test_another_winner_is_tried_in_the_next_round(tuned, trials, monkeypatch):
    find, rounds = tuning.find_for_job, []

    def another(*args):
        """Each time the next of the best three is the best."""
        rounds.append(1)
        search = find(*args[:2], 3)
        found = [search.best, *search.runners_up]
        return replace(search, best=found[(len(rounds) - 1) % len(found)], runners_up=())

    monkeypatch.setattr(tuning, "find_for_job", another)
    trials.slow = lambda policy: len(trials.runs) == 1
    _, found = tuned("--top 1 --rounds 2 --repeats 1")
    tried = [one["policy"] for one in found["tried"]]
    assert len(tried) == 2 and tried[0] != tried[1] == found["policy"]
    assert [lanes for _, _, lanes in trials.runs] == [True, True]


def test_another_order_than_the_default_is_tried_and_reported(tuned, trials, monkeypatch):
    """The same policy in two orders is two candidates, and a file alone would run in its own."""
    find = tuning.find_for_job

    def in_two_orders(*args):
        search = find(*args)
        normal = replace(search.best, order="normal")
        return replace(search, best=search.best, runners_up=(normal,))

    monkeypatch.setattr(tuning, "find_for_job", in_two_orders)
    trials.slow = lambda policy: len(trials.runs) == 1
    out, found = tuned("--top 2 --rounds 1 --repeats 1")
    own, other = found["tried"]
    assert own["policy"] == other["policy"] and (own["order"] != other["order"] == "normal" == found["order"])
    assert "# Order: normal, not the default: add --order normal to every run." in out.read_text()
    (command,) = re.findall("Run it: python -m flexgen.bench (.*)", out.read_text())
    assert bench.make_parser().parse_args(command.split()).order == "normal"


def test_failing_candidates_are_reported_and_left_out(tuned, trials, capsys):
    seen = []
    trials.fails = lambda policy: not seen.append(policy) and policy == seen[0]
    _, found = tuned("--top 2 --rounds 1 --repeats 2")
    text = capsys.readouterr()
    assert "left out, it failed: it needs more than there is" in text.err and "failed" in text.out
    assert found["tried"][0]["failure"] == "it needs more than there is"
    assert found["policy"] == found["tried"][1]["policy"]


def test_where_all_fail_nothing_is_written(tuned, trials, capsys):
    trials.fails = lambda policy: True
    out, _ = tuned("--rounds 1", status=1)
    assert not out.exists()
    assert "candidate policies ran: it needs more than there is. Free memory" in capsys.readouterr().err


def test_an_interrupt_keeps_the_best_so_far(tuned, trials, capsys):
    def fails(policy):
        if len(trials.runs) == 2:
            raise KeyboardInterrupt
        return False

    trials.fails = fails
    out, found = tuned("--top 3", status=130)
    assert Policy.load(out).to_dict() == found["policy"] and "Measured: " in out.read_text()
    printed = capsys.readouterr()
    assert "interrupted" in printed.err and "not run" in printed.out and "failed" not in printed.out
    assert not any("failure" in one for one in found["tried"])
    assert [path.name for path in Path(out.parent).iterdir() if "part" in path.name] == []


def test_repeats_that_differ_are_repeated(tuned, trials):
    counted = []
    trials.slow = lambda policy: not counted.append(1) and len(counted) == 1
    tuned("--top 1 --rounds 1 --repeats 3")
    assert len(trials.runs) == 6


def test_given_fields_stay(tuned):
    out, found = tuned("--top 2 --rounds 1 --repeats 1 --gpu-batch-size 2 --sep-layer no")
    assert all(
        (one["policy"]["gpu_batch_size"], one["policy"]["sep_layer"]) == (2, False) for one in found["tried"]
    )


def test_simulate_only_runs_nothing_and_draws_the_frontier(tmp_path, trials, capsys):
    pytest.importorskip("matplotlib")
    png, out = tmp_path / "frontier.png", tmp_path / "policy.toml"
    flags = (
        f"--model opt-125m --hardware t4 --simulate-only --prompt-len 16 --gen-len 4 --num-prompts 4 -o {out}"
    )
    assert tune.main([*flags.split(), "--frontier", str(png)]) == 0
    text = capsys.readouterr().out
    assert trials.runs == [] and "Measured: no run" in out.read_text() and "t4" in out.read_text()
    assert "Run it: python -m flexgen.simulate --model opt-125m --policy" in out.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert text.splitlines()[0].split() == ["prompts", "latency", "tokens/s", "block", "weights"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hardware t4", "add --simulate-only"),
        ("--policy some.toml", "tune searches for the policy"),
        ("--hardware t5 --simulate-only", "hardware 't5' is not known"),
    ],
)
def test_invalid_arguments_are_one_clear_line(flags, said, capsys):
    assert tune.main(flags.split()) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_a_missing_matplotlib_is_reported_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tuning, "find_for_job", lambda *args, **kwargs: pytest.fail("worked"))
    assert tune.main(["--hardware", "t4", "--simulate-only", "--frontier", "x.png"]) == 1
    assert "pip install 'flexgen[plot]'" in capsys.readouterr().err


# Trials


def test_trials_grow_to_one_whole_block(tiny):
    spec, _ = open_model(tiny, "dummy")
    found = list(shapes(spec, Policy(gpu_batch_size=2, num_gpu_batches=3), Workload(8, 20, 5)))
    assert found[0].layers < spec.num_layers and found[0].workload.gen_len < 20
    assert (found[-1].layers, found[-1].workload) == (spec.num_layers, Workload(8, 20, 5))
    sizes = [(shape.layers, shape.workload.gen_len) for shape in found]
    assert all(
        a <= c and b <= d and (a, b) != (c, d) for (a, b), (c, d) in zip(sizes, sizes[1:], strict=False)
    )
    assert [s.workload.num_prompts for s in shapes(spec, Policy(gpu_batch_size=2), Workload(8, 20, 5))][
        0
    ] == 2


def test_the_seconds_decide_how_much_is_run(tiny, nothing_is_measured):
    spec, _ = open_model(tiny, "dummy")
    job = Job.checked(spec, nothing_is_measured("cpu"), Workload(8, 20, 4)), Policy(gpu_batch_size=4)
    all_of_it = shape_for(*job, 1e9)
    assert (all_of_it.layers, all_of_it.workload.gen_len) == (spec.num_layers, 20)
    least = shape_for(*job, 0.0)
    assert least == next(shapes(spec, Policy(gpu_batch_size=4), Workload(8, 20, 4)))
    took = predicted_trial(*job, all_of_it).total_s
    part = shape_for(*job, took / 2)
    assert least != part != all_of_it and predicted_trial(*job, part).total_s <= took / 2


def test_a_trial_runs_the_first_layers(tiny):
    shape = next(shapes(open_model(tiny, "dummy")[0], Policy(gpu_batch_size=2), Workload(8, 20, 4)))
    opening = dict(model=tiny, weights="dummy", device="cpu", progress=False)
    policy = Policy(gpu_batch_size=2, weights={"disk": 100})
    report = run_trial(opening, policy, None, shape, lanes=True)
    assert (report.num_prompts, report.gen_len) == (2, shape.workload.gen_len)
    assert report.phases[Phase.DECODE][LaneName.DISK_READ] > 0 and report.prefill_s > 0
    assert not run_trial(opening, policy, "normal", shape, lanes=False).phases


def test_tuning_runs_for_real(tiny, tmp_path):
    out = tmp_path / "policy.toml"
    flags = f"--model {tiny} --weights dummy --device cpu {JOB} --top 1 --rounds 1 --repeats 1 -o {out}"
    assert tune.main(flags.split()) == 0
    assert "Measured: " in out.read_text() and "projected from the median of 1 runs" in out.read_text()
    Policy.load(out)
