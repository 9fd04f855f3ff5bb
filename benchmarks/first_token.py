"""Measure the time from the start of a process to its first token, for flexgen and for llama.cpp.

    python benchmarks/first_token.py --work-dir DIR --llama-python PATH [--format bf16 ...] [--repeats 5]

PATH is the Python of an environment with llama-cpp-python (built for this processor) and gguf. DIR stores random
weights of a Llama shape with 1.04B parameters, written once in bfloat16, and their GGUF files (Q8_0 for int8, Q4_0
for int4).

Each run is a new process that imports its engine, opens the model with all weights in memory, and generates one token
after a prompt of 16. llama.cpp maps a file that is already encoded. flexgen has the bfloat16 weights. With
`fast_start`, it maps them, and maps those in int8 and int4 from files that its first start has written. Without it
("flexgen, copied"), it reads them, and encodes them in each start.

A first process of each kind brings the files into the page cache; `first` has its figures. Another process only
imports torch. A repeat runs each process once, one after the other. `seconds` is the time from the start of the
process; the other figures are its parts.

`ratio` is (llama.cpp + the import of torch) / flexgen with `fast_start`, the median of the repeats: above 1, flexgen
is faster. `over_torch_s` is what the import of flexgen takes in addition to that of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from record import interleaved, save
from shapes import write_model

PEERS = Path(__file__).resolve().parent / "peers"
MODEL = "llama-1b-32k"
PROMPT_LEN = 16
FORMATS = ("bf16", "int8", "int4")
TORCH, OURS, COPIED, THEIRS = "import torch", "flexgen", "flexgen, copied", "llama.cpp"


def main() -> None:
    args = make_parser().parse_args()
    folder = args.work_dir.resolve() / MODEL
    if not folder.exists():
        write_model(MODEL, folder)
    job: dict[str, Any] = {
        "model": str(folder),
        "prompt_len": PROMPT_LEN,
        "threads": args.threads,
        "ubatch": 512,
    }
    cases: dict[str, Callable[[], dict[str, float]]] = {TORCH: import_torch}
    for form in args.format or FORMATS:
        own = job | {"format": form}
        for name, fast_start in ((OURS, True), (COPIED, False)):
            offload_dir = str(args.work_dir.resolve() / f"first-token-{fast_start}")
            ours = own | {"fast_start": fast_start, "offload_dir": offload_dir}
            cases[f"{name} {form}"] = partial(first_token, sys.executable, "flexgen_first_token.py", ours)
        if args.llama_python:
            worker = args.llama_python, "llama_cpp_first_token.py"
            process([worker[0], str(PEERS / worker[1]), json.dumps(own | {"write": True})], args.threads)
            cases[f"{THEIRS} {form}"] = partial(first_token, *worker, own)
    first = {name: run() for name, run in cases.items()}
    figures = interleaved(cases, args.repeats)
    for name, found in figures.items():
        print(f"{name:<20}" + " ".join(f"{key} {each['median']:.3g}" for key, each in found.items()))
    ratios = compare(figures)
    for name, ratio in ratios.items():
        print(f"{name:<20} {ratio:.2f}")
    print(save("first_token", {"first": first, "figures": figures, "ratios": ratios}, args.out))


def import_torch() -> dict[str, float]:
    began = time.perf_counter()
    process([sys.executable, "-c", "import torch"], None)
    return {"seconds": time.perf_counter() - began}


def first_token(python: str, worker: str, job: Mapping[str, Any]) -> dict[str, float]:
    """Seconds from the start of a process to its first token, and their parts."""
    began = time.perf_counter()  # of the same clock in all processes
    words = [python, str(PEERS / worker), json.dumps({**job, "began": began})]
    found: dict[str, float] = json.loads(process(words, job["threads"]).splitlines()[-1])
    return {"seconds": found.pop("ended") - began, **found}


def process(words: list[str], threads: int | None) -> str:
    """The output of a process that uses `threads` threads. Ends this process if it fails."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    if words[0] != sys.executable:  # the peer's Python has its own packages
        env.pop("PYTHONPATH", None)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        sys.exit(f"{words[1]}: ended with status {done.returncode}")
    return done.stdout


def compare(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`ratio` for each format, and `over_torch_s`."""
    ratios = {}
    torch_s = figures[TORCH]["seconds"]["all"]
    for form in FORMATS:
        ours, theirs = (figures.get(f"{name} {form}") for name in (OURS, THEIRS))
        if ours and theirs:
            runs = zip(ours["seconds"]["all"], theirs["seconds"]["all"], torch_s, strict=True)
            ratios[f"ratio {form}"] = statistics.median((peer + both) / own for own, peer, both in runs)
    imports = [each["flexgen_s"]["median"] for name, each in figures.items() if name.startswith(OURS)]
    return ratios | {"over_torch_s": statistics.median(imports)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--work-dir", type=Path, required=True)
    add("--llama-python", help="a Python with llama-cpp-python and gguf")
    add("--format", choices=FORMATS, action="append", help="measure only this format (may be repeated)")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=os.cpu_count())
    add("--out", type=Path, help="write the results to this file")
    return parser


if __name__ == "__main__":
    main()
