"""What `benchmarks/gpu.py` asks for fits the machine that it names, and what takes too long ends whole."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from flexgen import bench
from flexgen.flags import read_policy
from flexgen.memory.placement import place_weights
from flexgen.memory.plan import choose_order, plan_memory
from flexgen.models import build_layers, open_model
from flexgen.policy import Tier
from flexgen.units import GIB
from flexgen.workload import Workload

PATH = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["opt-6.7b", "opt-30b"])
def test_the_runs_fit(benchmark, model):
    assert set(benchmark.RUNS) == {"opt-6.7b", "opt-30b"}
    args = bench.make_parser().parse_args(["--model", model, *benchmark.SHAPE, *benchmark.RUNS[model]])
    policy, (spec, _) = read_policy(args), open_model(model, "dummy")
    layers = build_layers(spec, sep_layer=policy.sep_layer)
    placement = place_weights(layers, policy.weights, torch.float16)
    order = choose_order(None, policy, False, policy.num_gpu_batches)
    workload = Workload(args.prompt_len, args.gen_len, policy.block_size)
    plan = plan_memory(
        layers, placement, policy, torch.float16, False, workload, False, slots=order.slots
    ).by_tier
    assert args.device == "cuda:0,memory=16GiB" and plan[Tier.GPU] <= 0.9 * 16 * GIB
    assert plan[Tier.CPU] <= 0.9 * 100 * GIB and not plan[Tier.DISK]
    if model == "opt-30b":
        assert order.name == "overlap_cpu_attention"
        assert f"take {plan[Tier.CPU] / GIB:.0f} GiB there" in benchmark.__doc__


def test_a_case_that_is_done(benchmark, capfd):
    code = "import sys; print('first'); print('second', file=sys.stderr); sys.exit(3)"
    found = benchmark.call([sys.executable, "-u", "-c", code], 1000.0)
    assert (found["status"], found["output"]) == (3, "first\nsecond\n")
    assert capfd.readouterr().out == "  first\n  second\n"


def test_a_case_that_is_late_ends_with_all_that_it_has_started(benchmark):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    found = benchmark.call([sys.executable, "-c", code], 2.0)
    assert found["status"] is None
