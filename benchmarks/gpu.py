"""Everything that needs a GPU, in one command of less than ten minutes: the tests marked `gpu`, then OPT-6.7B
and OPT-30B with random weights under a cap of 16 GiB of device memory, the size of the paper's T4.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Needs 100 GiB of host memory: OPT-30B runs 48 prompts, as 4 batches of 12, whose cache and weights take 88 GiB there.
Each case's output is shown as it comes. Writes one JSON object after each case: the command, the GPU, the test
result, and a report of each run (the keys of `python -m flexgen.bench --json`). A run that fails is recorded with
the end of its output; the rest goes on.
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
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TEN_MINUTES = 600
SHAPE = ["--prompt-len", "512", "--gen-len", "32", "--weights", "dummy", "--device", "cuda:0,memory=16GiB"]

# Weights, cache, activations on gpu and cpu; prompts per batch, batches. The 30B policy attends on the CPU, which
# wants whole layers (docs/policies.md).
RUNS: dict[str, list[str]] = {
    "opt-6.7b": [
        *["--percent", "40", "60", "100", "0", "100", "0"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "1", "--cut-gen-len", "16"],
    ],
    "opt-30b": [
        *["--percent", "5", "95", "0", "100", "0", "100"],
        *["--gpu-batch-size", "12", "--num-gpu-batches", "4", "--cut-gen-len", "4"],
        *["--cpu-cache-compute", "--sep-layer", "no"],
    ],
}


def call(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command for at most `seconds`, and show what it says; its exit status (None: out of time), seconds and
    last lines."""
    began = time.perf_counter()
    lines: list[str] = []
    # A group of its own, so that what it has started ends with it.
    with subprocess.Popen(
        command,
        cwd=ROOT,
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
        "command": " ".join(["python", *command[1:]]),
        "status": process.returncode if in_time else None,
        "seconds": round(time.perf_counter() - began, 1),
        "output": "".join(lines)[-4000:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=0.95 * TEN_MINUTES, help="for everything together")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible to torch: nothing to measure", file=sys.stderr)
        return 1
    deadline = time.perf_counter() + args.seconds
    results: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    python = [sys.executable, "-u", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        reports = {model: Path(folder) / f"{model}.json" for model in RUNS}
        cases = {"tests": [*python, "pytest", "-v", "-m", "gpu"]} | {
            model: [*python, "flexgen.bench", "--model", model, *SHAPE, *flags, "--json", str(reports[model])]
            for model, flags in RUNS.items()
        }
        for n, (name, command) in enumerate(cases.items()):
            # What is left is shared by the cases that are left.
            seconds = max(deadline - time.perf_counter(), 1.0) / (len(cases) - n)
            print(f"== {n + 1} of {len(cases)}: {name}, {seconds:.0f} s at most", flush=True)
            result = results[name] = call(command, seconds)
            if name in reports and reports[name].exists():
                result["report"] = json.loads(reports[name].read_text())
            args.out.write_text(json.dumps(results, indent=1) + "\n")  # what is known so far is kept
            print(f"== {name}: {_ended(result['status'])} after {result['seconds']} s", flush=True)
    print(f"written to {args.out}")
    return int(any(r["status"] != 0 for r in results.values() if isinstance(r, dict)))


def _ended(status: int | None) -> str:
    return "out of time" if status is None else "passed" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
