"""`benchmarks/gpu.py`: its cases fit the named machine, steps that take too long are ended, and the peer runs its own
code."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flexgen import bench
from flexgen.cli.flags import read_policy
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import LINKED
from flexgen.models import build_layers, open_model
from flexgen.policy import Tier
from flexgen.units import GIB
from flexgen.workload import Workload

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RUNS = ["opt-6.7b", "opt-6.7b, weights streamed", "opt-30b"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # like the directory of a script
        return load(BENCHMARKS / "gpu.py")


@pytest.fixture(scope="module")
def worker():
    return load(BENCHMARKS / "peers" / "flexgen01_worker.py")


@pytest.mark.parametrize("run", RUNS)
def test_the_runs_fit(benchmark, tmp_path, run):
    assert list(benchmark.OURS) == RUNS
    command = benchmark.cases(tmp_path, None)[run]["command"]
    assert command[2:4] == ["-m", "flexgen.bench"]
    args = bench.make_parser().parse_args(command[4:])
    policy, (spec, _) = read_policy(args), open_model(args.model, "dummy")
    layers = build_layers(spec, sep_layer=policy.sep_layer)
    placement = place_weights(layers, policy.weights, torch.float16)
    order = LINKED.choose_order(None, policy, policy.num_gpu_batches)
    workload = Workload(args.prompt_len, args.gen_len, policy.block_size)
    plan = plan_memory(layers, placement, policy, Target(LINKED, order.slots), workload).by_tier
    assert args.device == "cuda:0,memory=16GiB" and plan[Tier.GPU] <= 0.95 * 16 * GIB
    assert plan[Tier.CPU] <= 0.9 * 100 * GIB and not plan[Tier.DISK]
    if run == "opt-30b":
        assert order.name == "overlap_cpu_attention"
        assert f"take {plan[Tier.CPU] / GIB:.0f} GiB" in benchmark.__doc__


def test_the_peer_runs_for_each_model_without_this_package(benchmark, tmp_path):
    found = benchmark.cases(tmp_path / "reports", tmp_path / "peer")
    assert list(found) == [
        *["tests", "races", "leaks", "attention", "links", "graphs", "probe"],
        *["opt-6.7b", "busy", "opt-6.7b, weights streamed", "opt-30b"],
        *["opt-6.7b, flexgen 0.1.8", "opt-30b, flexgen 0.1.8"],  # last: in a call of its own
    ]
    case = found["opt-30b, flexgen 0.1.8"]
    assert case["cwd"] == tmp_path / "reports"
    assert case["environment"] == {"PYTHONPATH": str(tmp_path / "peer")}
    for flag in ["--prompt-len", "--gen-len", "--gpu-batch-size", "--num-gpu-batches"]:  # the same job
        ours, theirs = (
            command[command.index(flag) + 1] for command in (found["opt-30b"]["command"], case["command"])
        )
        assert ours == theirs


def test_the_emulated_runs_have_the_same_policies_and_shapes(benchmark, tmp_path):
    found = benchmark.emulated_cases(tmp_path)
    assert list(found) == RUNS
    for name, case in found.items():
        here, there = (
            bench.make_parser().parse_args(command[4:])
            for command in (case["command"], benchmark.cases(tmp_path, None)[name]["command"])
        )
        assert read_policy(here) == read_policy(there) and here.device.startswith("emulated:memory=16GiB,")
        few, whole = (open_model(args.model, "dummy")[0] for args in (here, there))
        assert here.json == str(tmp_path / name) and not (tmp_path / name).exists()
        same = {"name": "", "dtype": None, "layers": whole.first_layers(benchmark.EMULATED_LAYERS).layers}
        assert few.layers == same["layers"]
        assert replace(few, **same) == replace(whole, **same) and few.num_layers < whole.num_layers


def test_the_worker_refuses_this_package(tmp_path):
    path = BENCHMARKS / "peers" / "flexgen01_worker.py"
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "not 0.1.8: set PYTHONPATH" in done.stderr


def test_the_worker_reports_the_peer_s_own_timer(worker, monkeypatch, tmp_path):
    """The peer is a stand-in with the names that the worker takes of the real one."""
    costs, seen = [], []

    def add_parser_arguments(parser):
        for flag in ("--prompt-len", "--gen-len", "--gpu-batch-size", "--num-gpu-batches"):
            parser.add_argument(flag, type=int)
        parser.add_argument("--model")

    def run_flexgen(args):
        tokenizer = flex_opt.AutoTokenizer.from_pretrained("facebook/opt-30b", padding_side="left")
        seen.extend(tokenizer(["text"], padding="max_length", max_length=args.prompt_len).input_ids[0])
        assert args.path == "_DUMMY_"
        costs.extend([4.0, 1.0, 2.0, 1.0])

    flex_opt = SimpleNamespace(
        add_parser_arguments=add_parser_arguments,
        run_flexgen=run_flexgen,
        DUMMY_WEIGHT="_DUMMY_",
        AutoTokenizer=None,
    )
    package, timer = ModuleType("flexgen"), ModuleType("flexgen.timer")
    package.flex_opt, timer.timers = flex_opt, lambda name: SimpleNamespace(costs=costs)
    monkeypatch.setitem(sys.modules, "flexgen", package)
    monkeypatch.setitem(sys.modules, "flexgen.timer", timer)
    monkeypatch.setattr(worker, "version", lambda name: "0.1.8")
    fractions = []
    for name, stand_in in {
        "get_device_properties": lambda device: SimpleNamespace(total_memory=64 * GIB),
        "set_per_process_memory_fraction": fractions.append,
        "max_memory_allocated": lambda: 5,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    flags = ["--model", "facebook/opt-30b", "--prompt-len", "8", "--gen-len", "4", "--gpu-memory-gib", "16"]
    batches = ["--gpu-batch-size", "3", "--num-gpu-batches", "2", "--json", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", ["worker", *flags, *batches])
    worker.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(seen) == 8 and worker.PADDING not in seen and fractions == [0.25]
    assert (report["prefill_s"], report["decode_s"]) == (4.0, 4.0)
    assert (report["prefill_tokens_s"], report["decode_tokens_s"], report["throughput_tokens_s"]) == (
        12.0,
        4.5,
        3.0,
    )


def test_only_runs_that_ended_are_compared(benchmark):
    run = {"status": 0, "report": {"goal_share": 0.9, "decode_tokens_s": 12.0}}
    peer = {"status": 0, "report": {"decode_tokens_s": 4.0}}
    results = {"gpu": "name", "opt-30b": run, "opt-30b, flexgen 0.1.8": peer, "opt-6.7b": run}
    assert benchmark.compare(results) == {
        "share of the goal": {"opt-6.7b": 0.9, "opt-30b": 0.9},
        "decode over flexgen 0.1.8": {"opt-30b": 3.0},
    }
    late = {"status": None}
    assert benchmark.compare({**results, "opt-30b": late})["decode over flexgen 0.1.8"] == {}


def test_a_case_that_is_done(benchmark, capfd):
    code = "import sys; print('first'); print('second', file=sys.stderr); sys.exit(3)"
    found = benchmark.call([sys.executable, "-u", "-c", code], 1000.0)
    assert (found["status"], found["output"]) == (3, "first\nsecond\n")
    assert capfd.readouterr().out == "  first\n  second\n"


def test_a_case_that_is_late_ends_with_all_that_it_has_started(benchmark):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    found = benchmark.call([sys.executable, "-c", code], 2.0)
    assert found["status"] is None


@pytest.fixture
def steps(benchmark, monkeypatch):
    """Steps whose commands fail as often as `steps[name]` says, then pass; which of them ran, in order."""
    fails, ran = {"tests": 0, "races": 1, "probe": 0}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(benchmark, "cases", lambda *_: {name: {"command": [name]} for name in fails})

    def call(command, seconds):
        (name,) = command
        ran.append(name)
        fails[name] -= 1
        return {"status": int(fails[name] >= 0), "seconds": seconds, "output": ""}

    monkeypatch.setattr(benchmark, "call", call)
    return ran


def run(benchmark, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, flags)])
    return benchmark.main()


def test_a_later_call_continues_with_the_steps_that_have_not_passed(
    benchmark, steps, monkeypatch, tmp_path, capsys
):
    assert run(benchmark, monkeypatch, "--out", tmp_path) == 1
    assert steps == ["tests", "races", "probe"]
    assert json.loads((tmp_path / "races.json").read_text())["status"] == 1
    assert "not passed: races" in capsys.readouterr().out
    assert run(benchmark, monkeypatch, "--out", tmp_path) == 0
    assert steps == ["tests", "races", "probe", "races"] and "all steps are done" in capsys.readouterr().out
    assert run(benchmark, monkeypatch, "--out", tmp_path, "--again", "--only", "probe") == 0
    assert steps[-1] == "probe"


def test_a_call_begins_no_step_that_it_has_no_time_for(benchmark, steps, monkeypatch, tmp_path):
    assert run(benchmark, monkeypatch, "--out", tmp_path, "--seconds", 0) == 1
    assert steps == ["tests"]  # the first one may need all of a call
