"""Compare flexgen on the CPU, everything in memory, with llama.cpp, transformers and vLLM's build for CPUs.

    python benchmarks/cpu_peers.py --work-dir DIR --llama-python PATH --vllm-python PATH [--case bf16-1 ...]
    python benchmarks/cpu_peers.py --work-dir DIR --llama-python PATH --limit 1200MB [--case bf16-1 ...]

PATH is the Python of a separate environment: one with llama-cpp-python (built for this processor) and gguf, one with
vLLM. An engine without a path is left out; transformers is that of this environment. DIR stores random weights of a
Llama shape with 1.04B parameters, written once in bfloat16, and its GGUF files. With `--model qwen3-30b-a3b-cut`, the
model has two layers of the Qwen3-30B-A3B shape, each with 128 experts, and a vocabulary of 32,000; these results are
in `cpu_peers_mixture.json`.

A case is a number format and a batch, such as `int4-8`. Formats of 16 bits are compared with all engines, `int8` and
`int4` (8.5 and 4.5 bits per weight) with llama.cpp's Q8_0 and Q4_0, which have the same bits. With these, llama.cpp
rounds activations to int8; flexgen does so only with `int8_a8` and `int4_a8`. All engines get the same weights, token
ids and number of threads, decode greedily and stop at no token. Each engine runs in a process that stays open; a
repeat runs each of them once, one after the other, and measures the read bandwidth of the memory. Times are medians
of the repeats, ratios medians of the ratios of each repeat: above 1, flexgen is faster.

With --limit, the model does not fit: each run is a new process in a memory control group of that size (Linux, as
root), with an empty page cache. flexgen runs with `policy="auto"`, llama.cpp maps its file; the other engines do not
run. The first run measures the machine for the policy search, if it was not measured before. These results are in
`cpu_peers_limited.json`.

A case adds its repeats to the results with --resume, so a long case can be split into several runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cgroup import MemoryGroup, drop_caches
from cpu_kernels import read_cases
from record import RESULTS, load_results, save
from shapes import write_model
from workers import Worker, instruction_sets, say

from flexgen.probe.measured import measured
from flexgen.units import parse_bytes

MODELS = {"llama-1b-32k": "cpu_peers", "qwen3-30b-a3b-cut": "cpu_peers_mixture"}
"""The models by name, with the name of their results."""
PROMPT_LEN = 128
FORMATS = ("bf16", "fp16", "int8", "int4", "int8_a8", "int4_a8")
BATCHES = (1, 8, 32)
CASES = [f"{form}-{batch}" for form in FORMATS for batch in BATCHES]
OURS = "flexgen"
PARTS = ("prefill_s", "step_s")
READ_BYTES = 256 << 20


class Engine(NamedTuple):
    """An engine: its worker in `peers/`, and the formats that it is measured in.

    python: the argument with its Python; None for the one that runs this benchmark.
    larger_than_memory: whether it runs models that are larger than memory.
    """

    worker: str
    python: str | None
    formats: Sequence[str]
    larger_than_memory: bool = False


ENGINES = {
    OURS: Engine("flexgen_cpu_worker.py", None, FORMATS, True),
    "llama.cpp": Engine("llama_cpp_worker.py", "llama_python", FORMATS, True),
    "transformers": Engine("transformers_worker.py", None, ("bf16", "fp16")),
    "vllm": Engine("vllm_worker.py", "vllm_python", ("bf16", "fp16")),
}


def main() -> None:
    args = make_parser().parse_args()
    path = args.out or RESULTS / f"{MODELS[args.model]}{'_limited' if args.limit else ''}.json"
    torch.set_num_threads(args.threads)
    if args.limit:
        measured("cpu", args.work_dir)
    if not (args.work_dir / args.model).exists():
        write_model(args.model, args.work_dir / args.model)
    for case in args.case or CASES:
        found = (measure_limited if args.limit else measure)(case, args)
        document = load_results(path)
        cases: dict[str, Any] = document.get("cases", {})
        if args.resume and case in cases:
            found["repeats"] = cases[case]["repeats"] + found["repeats"]
            found["opened"] = cases[case]["opened"] | found["opened"]
        cases[case] = found | figures(found, int(case.split("-")[1]))
        ordered = {case: cases[case] for case in CASES if case in cases}
        print(line(case, cases[case]), flush=True)
        save(path.stem, {"instruction_sets": instruction_sets(), "cases": ordered}, path)
    print(path)


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Open all engines of a case, and run them one after the other, `args.repeats` times."""
    job = make_job(case, args)
    workers: dict[str, Worker] = {}
    try:
        for name in engines(case, args):
            workers[name] = open_worker(name, args, job)
        repeats: list[dict[str, Any]] = []
        for n in range(args.repeats):
            repeat: dict[str, Any] = {"read_bytes_per_s": read_bandwidth()}
            for name, worker in workers.items():
                repeat[name] = worker.run()
                say(f"{case} repeat {n + 1} {name}: {brief(repeat[name])}")
            repeats.append(agreement(repeat))
        opened = {name: worker.opened for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.end()
    return {**given(job), "opened": opened, "repeats": repeats}


def measure_limited(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` with a new process in a memory control group for each run."""
    job = make_job(case, args)
    opened: dict[str, Any] = {}
    repeats: list[dict[str, Any]] = []
    for n in range(args.repeats):
        repeat: dict[str, Any] = {"read_bytes_per_s": read_bandwidth()}
        for name in engines(case, args):
            with MemoryGroup(args.limit) as group:
                drop_caches()
                worker = open_worker(name, args, job, group)
                try:
                    repeat[name] = worker.run()
                    opened[name] = worker.opened
                finally:
                    worker.end()
            say(f"{case} repeat {n + 1} {name}: {brief(repeat[name])}")
        repeats.append(agreement(repeat))
    return {**given(job), "limit_bytes": args.limit, "opened": opened, "repeats": repeats}


def engines(case: str, args: argparse.Namespace) -> list[str]:
    """The engines that run a case."""
    form = case.split("-")[0]
    return [
        name
        for name, engine in ENGINES.items()
        if form in engine.formats
        and python_of(engine, args)
        and (not args.engine or name in args.engine)
        and (not args.limit or engine.larger_than_memory)
    ]


def python_of(engine: Engine, args: argparse.Namespace) -> str | None:
    return sys.executable if engine.python is None else getattr(args, engine.python)


def make_job(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """The argument of the workers."""
    form, batch = case.split("-")
    return {
        "model": str((args.work_dir / args.model).resolve()),
        "folder": str(args.work_dir.resolve()),
        "format": form,
        "batch": int(batch),
        "prompt_len": PROMPT_LEN,
        "new": args.new,
        "threads": args.threads,
        "ubatch": args.ubatch,
        "limit": args.limit,
    }


def open_worker(
    name: str, args: argparse.Namespace, job: Mapping[str, Any], group: MemoryGroup | None = None
) -> Worker:
    """A process of the engine `name`, in the control group `group` if there is one."""
    python = python_of(ENGINES[name], args)
    assert python is not None
    return Worker(python, ENGINES[name].worker, job, group)


def given(job: Mapping[str, Any]) -> dict[str, Any]:
    return {key: job[key] for key in ("prompt_len", "new", "threads")}


def read_bandwidth() -> float:
    """Bytes/s of reading memory with all threads: the better one of a plain compiled loop and torch.sum."""
    calls: Mapping[str, Callable[[], dict[str, float]]] = read_cases(
        torch.ones(READ_BYTES, dtype=torch.uint8)
    )
    return 1e9 * max(call()["GB/s"] for call in calls.values())


def agreement(repeat: dict[str, Any]) -> dict[str, Any]:
    """The repeat with the number of new ids that are those of flexgen instead of all ids.

    The first id of each row is counted separately: after a different id, all later ones may differ.
    """
    ids = {name: run["tokens"] for name, run in repeat.items() if name in ENGINES}
    ours = ids.get(OURS)
    for name, theirs in ids.items():
        own = {part: repeat[name][part] for part in PARTS}
        if ours is not None and name != OURS:
            pairs = list(zip(ours, theirs, strict=True))
            own["same_first_ids"] = f"{sum(a[0] == b[0] for a, b in pairs)} of {len(pairs)}"
            same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
            own["same_ids"] = f"{same} of {sum(len(row) for row in ours)}"
        repeat[name] = own
    return repeat


def figures(found: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Medians of the repeats by engine, and the ratios of other engines' times to flexgen's.

    tokens_per_s: new tokens of the whole batch over the time of prefill and decode.
    read_share: the weights' bytes over the time of a step, as a share of the read bandwidth of the same repeat. It
        means something at batch 1.
    """
    repeats = found["repeats"]
    medians: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for name, opened in found["opened"].items():
        runs = [(repeat[name], repeat) for repeat in repeats if name in repeat]
        medians[name] = {part: statistics.median(run[part] for run, _ in runs) for part in PARTS}
        seconds = medians[name]["prefill_s"] + (found["new"] - 1) * medians[name]["step_s"]
        medians[name]["tokens_per_s"] = batch * found["new"] / seconds
        medians[name]["read_share"] = statistics.median(
            opened["weight_bytes"] / run["step_s"] / repeat["read_bytes_per_s"] for run, repeat in runs
        )
        if name != OURS and OURS in found["opened"]:
            pairs = [(run, repeat[OURS]) for run, repeat in runs if OURS in repeat]
            ratios[name] = {part: statistics.median(a[part] / b[part] for a, b in pairs) for part in PARTS}
    return {"medians": medians, "ratios": ratios}


def line(case: str, found: Mapping[str, Any]) -> str:
    text = f"{case:<8}"
    for name, own in found["medians"].items():
        text += f" | {name} prefill {own['prefill_s']:.2f} s, step {1e3 * own['step_s']:.1f} ms"
        text += f" ({own['read_share']:.0%} of read)" if case.endswith("-1") else ""
        if ratio := found["ratios"].get(name):
            text += f", ratio {ratio['prefill_s']:.2f} {ratio['step_s']:.2f}"
    return text


def brief(run: Mapping[str, Any]) -> str:
    return f"prefill {run['prefill_s']:.3f} s, step {1e3 * run['step_s']:.2f} ms"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--work-dir", type=Path, required=True)
    add("--model", choices=MODELS, default="llama-1b-32k")
    add("--llama-python", help="a Python with llama-cpp-python and gguf")
    add("--vllm-python", help="a Python with vLLM")
    add("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    add("--engine", choices=ENGINES, action="append", help="run only this engine (may be repeated)")
    add("--repeats", type=int, default=5)
    add("--new", type=int, default=32, help="new tokens of each row")
    add("--threads", type=int, default=os.cpu_count())
    add("--ubatch", type=int, default=512, help="tokens that llama.cpp computes together")
    add("--limit", type=parse_bytes, help="memory of each process, such as 1200MB")
    add("--resume", action="store_true", help="add the repeats to those in the results")
    add("--out", type=Path, help="write the results to this file")
    return parser


if __name__ == "__main__":
    main()
