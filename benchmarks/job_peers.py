"""Compare flexgen on the CPU, everything in memory, with vLLM and llama.cpp in a job of many prompts.

    python benchmarks/job_peers.py --work-dir DIR --llama-python PATH --vllm-python PATH [--prompts 512]

PATH is the Python of a separate environment, and DIR stores the weights, as for `cpu_peers.py`: random weights of a
Llama shape with 1.04B parameters in bfloat16. An engine without a path is left out.

All prompts begin with the same --prefix ids; each has --own other ids (evenly distributed between two numbers). The
numbers of new tokens are geometric with a mean of --mean-new, and --gen-len at most. All engines get the same ids and
the same number of threads, decode greedily, and end each prompt at its number of new tokens.

Each engine computes the prefix once, and replaces prompts that end by others: flexgen with one `generate`, vLLM with
one `generate` with prefix caching, llama.cpp with sequences of `llama_decode` that refer to the cells of the prefix
(see `peers/llama_cpp_job_worker.py`). The flags of vLLM and llama.cpp have the fastest of a few values that were
tried on two cores. flexgen's policy is the one that its search finds, or that of --policy.

Each engine runs in a process that stays open; a repeat runs each of them once, one after the other. `seconds` is the
time of the whole job without the opening of the model. Figures are medians of the repeats, ratios medians of the
ratios of each repeat: above 1, flexgen is faster. With --resume, the repeats are added to those in the results.
With --profile, the runs of flexgen also have the seconds and the rate of their products by number of rows, and the
seconds of attention.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, load_results, save
from shapes import write_model
from workers import Worker, instruction_sets, say

OURS = "flexgen"
MODEL = "llama-1b-32k"
WORKERS = {
    # engine: its worker in `peers/`, and the argument with its Python
    OURS: ("flexgen_job_worker.py", None),
    "vllm": ("vllm_job_worker.py", "vllm_python"),
    "llama.cpp": ("llama_cpp_job_worker.py", "llama_python"),
}
GIVEN = "prompts", "prefix", "own", "mean_new", "gen_len", "threads"
"""The arguments that describe the job."""


def main() -> None:
    args = make_parser().parse_args()
    path = args.out or RESULTS / "job_peers.json"
    torch.set_num_threads(args.threads)
    folder = args.work_dir.resolve() / MODEL
    if not folder.exists():
        write_model(MODEL, folder)
    names = [name for name in args.engine or WORKERS if python_of(name, args)]
    workers: dict[str, Worker] = {}
    repeats: list[dict[str, Any]] = []
    try:
        for name in names:
            python = python_of(name, args)
            assert python is not None
            workers[name] = Worker(python, WORKERS[name][0], job_of(args))
            say(f"{name}: {workers[name].opened}")
        for n in range(args.repeats):
            runs = {}
            for name, worker in workers.items():
                runs[name] = worker.run()
                say(f"repeat {n + 1} {name}: {runs[name]['seconds']:.1f} s")
            repeats.append(compared(runs))
    finally:
        for worker in workers.values():
            worker.end()
    opened = {name: worker.opened for name, worker in workers.items()}
    before = load_results(path) if args.resume else {}
    repeats = before.get("repeats", []) + repeats
    job = {key: getattr(args, key) for key in GIVEN}
    found = {"job": job, "opened": before.get("opened", {}) | opened, "repeats": repeats}
    if before and before["job"] != job:
        sys.exit(f"{path} has the results of another job: {before['job']}")
    summary = figures(repeats)
    for name, own in summary["medians"].items():
        ratio = summary["ratios"].get(name)
        compared_to = f", {ratio:.2f} times flexgen's" if ratio else ""
        print(f"{name:<10} {own['seconds']:7.1f} s, {own['tokens_per_s']:6.2f} new tokens/s{compared_to}")
    print(save(path.stem, {"instruction_sets": instruction_sets(), **found, **summary}, path))


def python_of(name: str, args: argparse.Namespace) -> str | None:
    argument = WORKERS[name][1]
    return sys.executable if argument is None else getattr(args, argument)


def job_of(args: argparse.Namespace) -> dict[str, Any]:
    """The argument of the workers."""
    settings = "policy", "profile", "vllm_rows", "vllm_tokens", "llama_rows", "llama_tokens", "llama_ubatch"
    job = {key: getattr(args, key) for key in (*GIVEN, *settings)}
    folder = args.work_dir.resolve()
    return job | {
        "model": str(folder / MODEL),
        "folder": str(folder),
        "llama_unified": not args.llama_apart,
    }


def compared(runs: dict[str, Any]) -> dict[str, Any]:
    """The runs with their new tokens per second, and how many new ids are those of flexgen instead of all ids."""
    ours = runs[OURS]["tokens"] if OURS in runs else None
    found = {}
    for name, run in runs.items():
        tokens = run["tokens"]
        own = {key: value for key, value in run.items() if key != "tokens"}
        own["new_tokens"] = sum(map(len, tokens))
        own["tokens_per_s"] = own["new_tokens"] / run["seconds"]
        if ours is not None and name != OURS:
            assert list(map(len, tokens)) == list(map(len, ours)), f"{name} made other numbers of tokens"
            pairs = list(zip(ours, tokens, strict=True))
            own["same_first_ids"] = f"{sum(a[0] == b[0] for a, b in pairs)} of {len(pairs)}"
            same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
            own["same_ids"] = f"{same} of {own['new_tokens']}"
        found[name] = own
    return found


def figures(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the repeats by engine, and the ratios of other engines' times to flexgen's."""
    medians: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in WORKERS:
        runs: list[Mapping[str, Any]] = [repeat for repeat in repeats if name in repeat]
        if not runs:
            continue
        parts = "seconds", "tokens_per_s"
        medians[name] = {part: statistics.median(run[name][part] for run in runs) for part in parts}
        pairs = [run for run in runs if OURS in run]
        if name != OURS and pairs:
            ratios[name] = statistics.median(run[name]["seconds"] / run[OURS]["seconds"] for run in pairs)
    return {"medians": medians, "ratios": ratios}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--work-dir", type=Path, required=True)
    add("--llama-python", help="a Python with llama-cpp-python and gguf")
    add("--vllm-python", help="a Python with vLLM")
    add("--engine", choices=WORKERS, action="append", help="run only this engine (may be repeated)")
    add("--prompts", type=int, default=512)
    add("--prefix", type=int, default=256, help="ids that all prompts share")
    add("--own", type=int, nargs=2, default=[16, 48], help="the fewest and the most other ids of a prompt")
    add("--mean-new", type=float, default=16.0, help="mean number of new tokens, before they are cut off")
    add("--gen-len", type=int, default=64, help="most new tokens of a prompt")
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=os.cpu_count())
    add(
        "--policy", default="auto", help='fields of flexgen\'s policy as JSON, such as {"gpu_batch_size": 64}'
    )
    add("--profile", action="store_true", help="time flexgen's products by number of rows, and its attention")
    add("--vllm-rows", type=int, default=64, help="max_num_seqs")
    add("--vllm-tokens", type=int, default=512, help="max_num_batched_tokens")
    add("--llama-rows", type=int, default=64, help="sequences that run together")
    add("--llama-tokens", type=int, default=512, help="most tokens of a call")
    add("--llama-ubatch", type=int, default=512, help="tokens that llama.cpp computes together")
    add("--llama-apart", action="store_true", help="a cache for each sequence instead of one for all")
    add("--resume", action="store_true", help="add the repeats to those in the results")
    add("--out", type=Path, help="write the results to this file")
    return parser


if __name__ == "__main__":
    main()
