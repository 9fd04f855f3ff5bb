"""All checks and benchmarks that need a GPU, in steps of less than ten minutes, the most informative steps first.

The steps are: the tests marked `gpu`; races, with torch's stream sanitizer; leaks; attention backends; pinning and
the link; CUDA graphs; the probe; OPT-6.7B and OPT-30B with random weights and a limit of 16 GiB of device memory,
like the paper's T4; a profile of OPT-6.7B; and with `--peer`, the package flexgen 0.1.8, which is the paper's own
code, with its published policy.

    pip install --target DIR --no-deps flexgen==0.1.8
    pip install --target DIR attrs pulp
    python benchmarks/gpu.py                   # repeat until it reports that all steps are done
    python benchmarks/gpu.py --peer DIR        # with the peer; only the peer if all other steps are done

One call takes less than ten minutes (`--seconds`). Each step writes its own JSON to `benchmarks/results/gpu`: the
command, the exit status, the end of its output and its figures. The next call skips the steps that passed (unless
`--again`) and repeats those that failed or ran out of time.

It needs 100 GiB of host memory: OPT-30B runs 48 prompts in 3 batches of 16, whose cache and weights take 88 GiB. The
peer needs 112 GiB, because its pinned memory rounds each tensor up to a power of two. Both sides generate all tokens.

`--toy` runs all steps on tiny models, to test the steps themselves. Without a GPU, `--emulated` runs the same
policies on the emulated device, with a few layers of the same shape and short prompts, in 24 GiB. It shows the losses
of the schedules, but not the speed of kernels and link.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, anywhere, load_results, machine, write_whole
from transformers import OPTConfig

from flexgen.models import open_model

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "peers" / "flexgen01_worker.py"
TEN_MINUTES = 600
MEMORY_GIB = 16
LENGTHS = ["--prompt-len", "512", "--gen-len", "32"]
EMULATED = ["--device", f"emulated:memory={MEMORY_GIB}GiB,link=1GiB", "--prompt-len", "32", "--gen-len", "8"]
EMULATED_LAYERS = 4
CHECKS = ("races", "leaks", "attention", "links", "graphs")
STEP_SECONDS = 60
"""A step does not begin if a call has less time left than this."""

# Weights, cache, activations on gpu and cpu; prompts per batch, batches.
OURS: dict[str, list[str]] = {
    # The search's result for an H100 with 16 GiB: all data on the GPU.
    "opt-6.7b": [
        *["--model", "opt-6.7b", "--percent", "100", "0", "100", "0", "100", "0"],
        *["--gpu-batch-size", "6", "--num-gpu-batches", "1"],
    ],
    "opt-6.7b, weights streamed": [
        *["--model", "opt-6.7b", "--percent", "40", "60", "100", "0", "100", "0"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "1"],
    ],
    # CPU attention, which needs whole layers (docs/policies.md).
    "opt-30b": [
        *["--model", "opt-30b", "--percent", "5", "95", "0", "100", "0", "100"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "3", "--cpu-cache-compute", "--sep-layer", "no"],
    ],
}

# Suites 6b7_1x1 and 30b_1x1 of benchmark/flexllmgen/bench_suite.py of FlexLLMGen at commit 004ffef (policies/). The
# second one has 16 prompts in a batch instead of 48, which do not fit in this memory.
PEERS: dict[str, list[str]] = {
    "opt-6.7b": [
        *["--model", "facebook/opt-6.7b", "--percent", "100", "0", "100", "0", "100", "0"],
        *["--gpu-batch-size", "2", "--num-gpu-batches", "1", "--overlap", "False"],
    ],
    "opt-30b": [
        *["--model", "facebook/opt-30b", "--percent", "20", "80", "0", "100", "0", "100"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "3", "--cpu-cache-compute"],
    ],
}


def call(
    command: list[str], seconds: float, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a command for at most `seconds`, with `environment` added to this process's, and show its output. Returns
    its exit status (None: out of time), its seconds and its last lines."""
    began = time.perf_counter()
    lines: list[str] = []
    # A separate process group, so that its child processes end with it.
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                lines.append(line)
            process.wait()
            in_time = late.is_alive()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            late.cancel()
    return {
        "command": " ".join(["python", *map(anywhere, command[1:])]),
        "status": process.returncode if in_time else None,
        "seconds": round(time.perf_counter() - began, 1),
        "output": "".join(lines)[-4000:],
    }


def cases(reports: Path, peer: Path | None, toy: bool = False) -> dict[str, dict[str, Any]]:
    """The steps by name, as arguments of `call`. Steps write their figures to `reports`, by the name of the case."""
    python = [sys.executable, "-u"]
    tests = ["tests/memory/test_gpu.py"] if toy else []
    found: dict[str, dict[str, Any]] = {
        "tests": {"command": [*python, "-m", "pytest", "-v", "-m", "gpu", *tests]}
    }
    found |= {name: _check(name, reports, toy) for name in CHECKS}
    figures = ["--again", "--quiet", "--output", str(reports / "probe.toml")]
    found["probe"] = {"command": [*python, "-m", "flexgen.measure", "--device", "cuda:0", *figures]}
    if toy:
        found["probe"] = _check("probe", reports, toy)
    for name, flags in OURS.items():
        # The roofline share needs the probe's figures.
        device = ["--weights", "dummy", "--predict", "--device", f"cuda:0,memory={MEMORY_GIB}GiB"]
        command = [*python, "-m", "flexgen.bench", *LENGTHS, *device, *flags, "--json", str(reports / name)]
        found[name] = {"command": command}
        if name == "opt-6.7b":
            found["busy"] = _check("busy", reports, toy)
    if toy:
        found |= {name: _toy(found[name]["command"], reports) for name in OURS}
    # Last, because they need a package that may not be installed.
    for name in PEERS if peer is not None else ():
        assert peer is not None
        theirs = f"{name}, flexgen 0.1.8"
        memory = ["--gpu-memory-gib", str(MEMORY_GIB)]
        figures = ["--json", str(reports / theirs)]
        flags = [*LENGTHS, *memory, *PEERS[name]]
        if toy:  # the smallest model that it supports
            for flag, value in ("--model", "facebook/opt-125m"), ("--prompt-len", "8"), ("--gen-len", "4"):
                flags[flags.index(flag) + 1] = value
        found[theirs] = {
            "command": [*python, str(WORKER), *flags, *figures],
            # Both packages are named flexgen: the peer's must be first on the path.
            "cwd": reports,
            "environment": {"PYTHONPATH": str(peer.resolve())},
        }
    return found


def _check(name: str, reports: Path, toy: bool) -> dict[str, Any]:
    """A command of `gpu_day`."""
    flags = ["--json", str(reports / name), *(["--toy"] if toy else [])]
    paths = filter(None, [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH")])
    return {
        "command": [sys.executable, "-u", "-m", f"gpu_day.{name}", *flags],
        "environment": {"PYTHONPATH": os.pathsep.join(paths)},
    }


def _toy(command: list[str], reports: Path) -> dict[str, Any]:
    """A benchmark with its policy, on a tiny model and without the probe's figures."""
    shape = reports / "shapes" / "toy"
    OPTConfig(
        vocab_size=64,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        dtype="float16",
    ).save_pretrained(shape)
    command = [word for word in command if word != "--predict"]
    for flag, value in (("--model", str(shape)), ("--prompt-len", "8"), ("--gen-len", "4")):
        command[command.index(flag) + 1] = value
    return {"command": command}


def emulated_cases(reports: Path) -> dict[str, dict[str, Any]]:
    """The steps of `OURS` on the emulated device."""
    found = {}
    for name, (_, model, *flags) in OURS.items():
        spec = open_model(model, "dummy")[0]
        few = OPTConfig(
            hidden_size=spec.hidden_size,
            word_embed_proj_dim=spec.hidden_size,
            ffn_dim=spec.layers[0].mlp.size,
            num_attention_heads=spec.layers[0].attention.heads,
            num_hidden_layers=EMULATED_LAYERS,
            dtype="bfloat16",
        )
        shape = reports / "shapes" / model
        few.save_pretrained(shape)
        command = [
            sys.executable,
            "-u",
            "-m",
            "flexgen.bench",
            "--model",
            str(shape),
            *EMULATED,
            *flags,
        ]
        found[name] = {"command": [*command, "--weights", "dummy", "--json", str(reports / name)]}
    return found


def compare(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """For each run with a report: the smaller share of bound and roofline, and decode tokens/s over the peer's."""
    runs = {name: run["report"] for name, run in results.items() if isinstance(run, dict) and "report" in run}
    peers = {name: runs.get(f"{name}, flexgen 0.1.8") for name in OURS}
    return {
        "share of the goal": {name: runs[name]["goal_share"] for name in OURS if name in runs},
        "decode over flexgen 0.1.8": {
            name: runs[name]["decode_tokens_s"] / peer["decode_tokens_s"]
            for name, peer in peers.items()
            if name in runs and peer
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: benchmarks/results/gpu)")
    add("--emulated", action="store_true", help="run without a GPU; writes to gpu_emulated")
    add("--toy", action="store_true", help="use tiny sizes, to test the steps; writes to gpu_toy")
    add("--peer", type=Path, metavar="DIR", help="directory in which flexgen 0.1.8 is installed")
    add(
        "--only",
        metavar="STEP",
        nargs="+",
        help="run only these steps: tests, a check, a model, `MODEL, flexgen 0.1.8`",
    )
    add("--again", action="store_true", help="also run steps that have passed")
    add("--seconds", type=float, default=0.95 * TEN_MINUTES, help="time limit of this call")
    args = parser.parse_args()
    if not args.emulated and not torch.cuda.is_available():
        print("torch finds no GPU, so there is nothing to measure; see --emulated", file=sys.stderr)
        return 1
    if args.peer is not None and not (args.peer / "flexgen" / "flex_opt.py").exists():
        parser.error(f"--peer {args.peer}: there is no flexgen/flex_opt.py in it; see the top of --help")
    deadline = time.perf_counter() + args.seconds
    out = args.out or RESULTS / ("gpu_emulated" if args.emulated else "gpu_toy" if args.toy else "gpu")
    out.mkdir(parents=True, exist_ok=True)
    device = {} if args.emulated else {"gpu": torch.cuda.get_device_name()}
    about = {"machine": machine(), **device, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        steps = emulated_cases(reports) if args.emulated else cases(reports, args.peer, args.toy)
        if unknown := set(args.only or ()) - set(steps):
            parser.error(f"--only: no step {', '.join(sorted(unknown))}; there are: {'; '.join(steps)}")
        steps = {name: step for name, step in steps.items() if args.only is None or name in args.only}
        left = [name for name in steps if args.again or load_results(_path(out, name)).get("status") != 0]
        for n, name in enumerate(left):
            seconds = deadline - time.perf_counter()
            # The first step always begins: it may need the whole call.
            if n and seconds < min(STEP_SECONDS, args.seconds / 2):
                break
            print(f"== {n + 1} of {len(left)}: {name}, {seconds:.0f} s at most", flush=True)
            result = about | call(seconds=max(seconds, 1.0), **steps[name])
            if (reports / name).exists():
                result["report"] = json.loads((reports / name).read_text())
            elif (reports / f"{name}.toml").exists():
                result["report"] = tomllib.loads((reports / f"{name}.toml").read_text())
            text = json.dumps(result, indent=1).replace(str(reports), "DIR")
            write_whole(_path(out, name), text + "\n")
            print(f"== {name}: {_ended(result['status'])} after {result['seconds']} s", flush=True)
    results = {name: load_results(_path(out, name)) for name in steps}
    comparison = compare(results)
    (out / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    open_ = [name for name, result in results.items() if result.get("status") != 0]
    state = f"not passed: {', '.join(open_)}; run it again to continue" if open_ else "all steps are done"
    print(f"written to {out}: {comparison}\n{state}")
    return int(bool(open_))


def _path(out: Path, step: str) -> Path:
    return out / (step.replace(", ", "_").replace(" ", "_") + ".json")


def _ended(status: int | None) -> str:
    return "out of time" if status is None else "passed" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
