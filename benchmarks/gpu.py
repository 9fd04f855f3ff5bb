"""Everything that needs a GPU, in one command of less than ten minutes: the tests marked `gpu`, then OPT-6.7B
and OPT-30B with random weights under a cap of 16 GiB of device memory, the size of the paper's T4.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Writes one JSON object: the command, the GPU, the test result, and a report of each run (the keys of
`python -m flexgen.bench --json`). A run that fails is recorded with the end of its output; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TEN_MINUTES = 600
SHAPE = ["--prompt-len", "512", "--gen-len", "32", "--weights", "dummy", "--device", "cuda:0,memory=16GiB"]

# Weights, cache, activations on gpu and cpu; prompts per batch, batches. The 30B policy attends on the CPU.
RUNS: dict[str, list[str]] = {
    "opt-6.7b": [
        *["--percent", "40", "60", "100", "0", "100", "0"],
        *["--gpu-batch-size", "16", "--num-gpu-batches", "1", "--cut-gen-len", "16"],
    ],
    "opt-30b": [
        *["--percent", "5", "95", "0", "100", "0", "100"],
        *["--gpu-batch-size", "24", "--num-gpu-batches", "4", "--cpu-cache-compute", "--cut-gen-len", "4"],
    ],
}


def call(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command for at most `seconds`; its exit status (None: out of time), seconds and last lines."""
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, output = None, (error.stdout or b"").decode(errors="replace")
    return {
        "command": " ".join(["python", *command[1:]]),
        "status": status,
        "seconds": round(time.perf_counter() - began, 1),
        "output": output[-4000:],
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
    python = [sys.executable, "-m"]
    results["tests"] = call([*python, "pytest", "-q", "-m", "gpu"], args.seconds / 3)
    with tempfile.TemporaryDirectory() as folder:
        for n, (model, flags) in enumerate(RUNS.items()):
            report = Path(folder) / f"{model}.json"
            # What is left is shared by the runs that are left.
            seconds = (deadline - time.perf_counter()) / (len(RUNS) - n)
            command = [*python, "flexgen.bench", "--model", model, *SHAPE, *flags, "--json", str(report)]
            results[model] = call(command, seconds)
            if report.exists():
                results[model]["report"] = json.loads(report.read_text())
            args.out.write_text(json.dumps(results, indent=1) + "\n")  # what is known so far is kept
    for name, result in results.items():
        if isinstance(result, dict):
            print(f"== {name}: status {result['status']}, {result['seconds']} s\n{result['output']}")
    return int(any(r["status"] != 0 for r in results.values() if isinstance(r, dict)))


if __name__ == "__main__":
    sys.exit(main())
