"""Everything that needs a GPU, in one command of less than ten minutes: the tests marked `gpu`, then OPT-6.7B
and OPT-30B with random weights under a cap of 16 GiB of device memory, the size of the paper's T4; beside each, where
`--peer` names it, the package flexgen 0.1.8, the paper's own code, with the policy that it published.

    pip install --target DIR --no-deps flexgen==0.1.8
    pip install --target DIR attrs pulp
    python benchmarks/gpu.py --peer DIR --out benchmarks/results/gpu.json

Needs 100 GiB of host memory: OPT-30B runs 48 prompts, as 3 batches of 16, whose cache and weights take 89 GiB there;
with the peer, whose pinned memory rounds each tensor up to a power of two, 112 GiB. Both sides generate every token.
Each case's output is shown as it comes. Writes one JSON object after each case: the command, the GPU, the test
result, a report of each run (the keys of `python -m flexgen.bench --json`), the shares of the bound, and the decode
throughput over the peer's. A run that fails is recorded with the end of its output; the rest goes on.

Without a GPU, `--emulated` runs the same policies on the emulated device, on a few layers of the same shape and short
prompts, in 24 GiB: what the schedules lose shows there too, what the kernels and the link give does not.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, anywhere, machine
from transformers import OPTConfig

from flexgen.models import open_model

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "peers" / "flexgen01_worker.py"
TEN_MINUTES = 600
MEMORY_GIB = 16
LENGTHS = ["--prompt-len", "512", "--gen-len", "32"]
EMULATED = ["--device", f"emulated:memory={MEMORY_GIB}GiB,link=1GiB", "--prompt-len", "32", "--gen-len", "8"]
EMULATED_LAYERS = 4

# Weights, cache, activations on gpu and cpu; prompts per batch, batches.
OURS: dict[str, list[str]] = {
    # What the search finds for one H100 of 16 GiB: everything on it.
    "opt-6.7b": [
        *["--model", "opt-6.7b", "--percent", "100", "0", "100", "0", "100", "0"],
        *["--gpu-batch-size", "6", "--num-gpu-batches", "1"],
    ],
    "opt-6.7b, weights streamed": [
        *["--model", "opt-6.7b", "--percent", "40", "60", "100", "0", "100", "0"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "1"],
    ],
    # Attends on the CPU, which wants whole layers (docs/policies.md).
    "opt-30b": [
        *["--model", "opt-30b", "--percent", "5", "95", "0", "100", "0", "100"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "3", "--cpu-cache-compute", "--sep-layer", "no"],
    ],
}

# Suites 6b7_1x1 and 30b_1x1 of benchmark/flexllmgen/bench_suite.py of FlexLLMGen at commit 004ffef (policies/), the
# latter with 16 prompts in a batch where it has 48, which this memory does not hold.
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
    """Run a command for at most `seconds`, with `environment` added to this one, and show what it says; its exit
    status (None: out of time), seconds and last lines."""
    began = time.perf_counter()
    lines: list[str] = []
    # A group of its own, so that what it has started ends with it.
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


def cases(reports: Path, peer: Path | None) -> dict[str, dict[str, Any]]:
    """What to `call`, by name. Runs write their figures to `reports`, to the name of the case."""
    python = [sys.executable, "-u"]
    found: dict[str, dict[str, Any]] = {"tests": {"command": [*python, "-m", "pytest", "-v", "-m", "gpu"]}}
    for name, flags in OURS.items():
        device = ["--weights", "dummy", "--device", f"cuda:0,memory={MEMORY_GIB}GiB"]
        command = [*python, "-m", "flexgen.bench", *LENGTHS, *device, *flags, "--json", str(reports / name)]
        found[name] = {"command": command}
        if peer is not None and name in PEERS:
            memory = ["--gpu-memory-gib", str(MEMORY_GIB)]
            theirs = f"{name}, flexgen 0.1.8"
            found[theirs] = {
                "command": [
                    *python,
                    str(WORKER),
                    *LENGTHS,
                    *memory,
                    *PEERS[name],
                    "--json",
                    str(reports / theirs),
                ],
                # Both packages are called flexgen: here the peer's comes first, and this one is out of sight.
                "cwd": reports,
                "environment": {"PYTHONPATH": str(peer.resolve())},
            }
    return found


def emulated_cases(reports: Path) -> dict[str, dict[str, Any]]:
    """The same for `OURS` on the emulated device."""
    found = {}
    for name, (_, model, *flags) in OURS.items():
        spec = open_model(model, "dummy")[0]
        few = OPTConfig(
            hidden_size=spec.hidden_size,
            word_embed_proj_dim=spec.hidden_size,
            ffn_dim=spec.ffn_size,
            num_attention_heads=spec.num_heads,
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
    """The shares of the bound, and decode tokens/s over the peer's, of the runs that have a report."""
    runs = {name: run["report"] for name, run in results.items() if isinstance(run, dict) and "report" in run}
    peers = {name: runs.get(f"{name}, flexgen 0.1.8") for name in OURS}
    return {
        "share of the bound": {name: runs[name]["bound_share"] for name in OURS if name in runs},
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
    parser.add_argument(
        "--out", type=Path, help="another file for the results than benchmarks/results/gpu.json"
    )
    parser.add_argument("--emulated", action="store_true", help="without a GPU; writes gpu_emulated.json")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="where flexgen 0.1.8 is installed")
    parser.add_argument("--only", metavar="CASE", nargs="+", help="tests, a model, `MODEL, flexgen 0.1.8`")
    parser.add_argument("--seconds", type=float, default=0.95 * TEN_MINUTES, help="for everything together")
    args = parser.parse_args()
    if not args.emulated and not torch.cuda.is_available():
        print("no GPU is visible to torch: nothing to measure (see --emulated)", file=sys.stderr)
        return 1
    if args.peer is not None and not (args.peer / "flexgen" / "flex_opt.py").exists():
        parser.error(f"--peer {args.peer}: there is no flexgen/flex_opt.py in it; see the top of --help")
    deadline = time.perf_counter() + args.seconds
    out = args.out or RESULTS / ("gpu_emulated.json" if args.emulated else "gpu.json")
    device = {"machine": machine()} if args.emulated else {"gpu": torch.cuda.get_device_name()}
    results: dict[str, Any] = {
        "command": "python benchmarks/gpu.py"
        + " --peer DIR" * bool(args.peer)
        + " --emulated" * args.emulated,
        **device,
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        chosen = emulated_cases(reports) if args.emulated else cases(reports, args.peer)
        if unknown := set(args.only or ()) - set(chosen):
            parser.error(f"--only: no case {', '.join(sorted(unknown))}; there are: {'; '.join(chosen)}")
        chosen = {name: case for name, case in chosen.items() if args.only is None or name in args.only}
        for n, (name, case) in enumerate(chosen.items()):
            # What is left is shared by the cases that are left.
            seconds = max(deadline - time.perf_counter(), 1.0) / (len(chosen) - n)
            print(f"== {n + 1} of {len(chosen)}: {name}, {seconds:.0f} s at most", flush=True)
            result = results[name] = call(seconds=seconds, **case)
            if (reports / name).exists():
                result["report"] = json.loads((reports / name).read_text())
            results["comparison"] = compare(results)
            text = json.dumps(results, indent=1).replace(str(reports), "DIR")
            out.write_text(text + "\n")  # what is known so far is kept
            print(f"== {name}: {_ended(result['status'])} after {result['seconds']} s", flush=True)
    print(f"written to {out}: {results['comparison']}")
    return int(any(results[name]["status"] != 0 for name in chosen))


def _ended(status: int | None) -> str:
    return "out of time" if status is None else "passed" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
