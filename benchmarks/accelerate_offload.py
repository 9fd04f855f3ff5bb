"""Compare flexgen with accelerate's disk offload: same weights, same disk, and memory for half of the model.

    python benchmarks/accelerate_offload.py --peer-python PATH --work-dir DIR

PATH is a Python with torch, transformers and accelerate, in a separate environment. DIR should be on a real disk;
random weights in bfloat16 are written there once. Each measurement is a separate process in a memory control group
(Linux, as root) of half the model's size, so that neither side can use the page cache for the whole model.

decode     the time of a step, at batch 4 and 16, with 128 prompt tokens and 32 new tokens
int4       flexgen with weights in int4, against flexgen in bfloat16 at the same batches
128/32, 32/128
           each side's best throughput over a list of batches; the first repeat tries them all

A total is the prefill plus (new tokens - 1) times the median of a few steps, timed right after the prompt (128/32) or
in the middle of the generated text (32/128). With --full, all steps run. Results are saved after each measurement,
and --resume continues with them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cgroup import MemoryGroup, drop_caches
from record import RESULTS, load_results, save
from shapes import SHAPES, write_model

from flexgen.units import format_bytes, parse_bytes

NAME = "accelerate_offload"
PEERS = Path(__file__).resolve().parent / "peers"
MODELS = ("opt-1.3b", "llama-1b")
CASES = ("decode", "int4", "128/32", "32/128")
EQUAL_BATCHES = (4, 16)
VARIANTS = ("safetensors", "folder", "split")


class Run(NamedTuple):
    """One measurement. `context`: the number of tokens after which steps are timed."""

    model: str
    engine: str
    prompt_len: int
    gen_len: int
    context: int
    batch: int
    batches: int = 1
    codec: str = "none"

    @property
    def key(self) -> str:
        codec = "" if self.codec == "none" else f" {self.codec}"
        size = f"{self.batch}x{self.batches}"
        return f"{self.model} {self.engine}{codec} {self.prompt_len}/{self.gen_len} {size}"

    @property
    def rows(self) -> int:
        return self.batch * self.batches


def main() -> None:
    args = make_parser().parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exception, so that the running process ends too
    bench = Bench(args)
    models = args.model or MODELS
    for model in models:
        bench.prepare(model)
    for repeat in range(args.repeats):
        for model in models:
            for run in bench.runs(model, repeat):
                bench.measure(run, repeat)
    print(json.dumps(bench.document["figures"], indent=1))
    print(bench.path)


class Bench:
    """The measurements so far, and the code that makes them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work_dir)
        self.path = Path(args.out) if args.out else RESULTS / f"{NAME}.json"
        old = load_results(self.path) if args.resume else {}
        self.document: dict[str, Any] = {
            "about": "totals are prefill_s + (gen_len - 1) * step_s, step_s the median of a repeat's steps"
            if not args.full
            else "all steps were run",
            "limits": old.get("limits", {}),
            "variants": old.get("variants", {}),
            "figures": {},
            "runs": old.get("runs", {}),
        }

    # The list of measurements

    def runs(self, model: str, repeat: int) -> Iterator[Run]:
        """The measurements of a repeat, alternating between the sides, without duplicates."""
        args, seen = self.args, set()
        for case in args.case or CASES:
            for run in self._case(model, case):
                best = case in ("decode", "int4") or repeat == 0 or run in self._best(model, case).values()
                if best and run not in seen:
                    seen.add(run)
                    yield run

    def _case(self, model: str, case: str) -> list[Run]:
        args = self.args
        if case in ("decode", "int4"):
            sides = [("accelerate", "none"), ("flexgen", "none")]
            if case == "int4":
                sides = [("flexgen", "none"), ("flexgen", "int4")]
            equal = args.equal_batches
            return [Run(model, e, 128, 32, 128, batch, 1, codec) for batch in equal for e, codec in sides]
        prompt_len, gen_len = map(int, case.split("/"))
        context = max(prompt_len, prompt_len + gen_len // 2) if gen_len > prompt_len else prompt_len
        context = prompt_len if args.full else context
        runs = [Run(model, "accelerate", prompt_len, gen_len, context, batch) for batch in args.batches]
        for block in args.blocks:
            batch, batches = map(int, block.split("x"))
            runs.append(Run(model, "flexgen", prompt_len, gen_len, context, batch, batches))
        return sorted(runs, key=lambda run: (run.rows, run.engine))

    def _best(self, model: str, case: str) -> dict[str, Run]:
        """The run of each side with the highest throughput (median so far)."""
        best: dict[str, tuple[float, Run]] = {}
        for run in self._case(model, case):
            if figures := self._figures(run):
                throughput = figures["tokens_per_s"]
                if throughput > best.get(run.engine, (0.0, run))[0]:
                    best[run.engine] = throughput, run
        return {engine: run for engine, (_, run) in best.items()}

    # One measurement

    def prepare(self, model: str) -> None:
        """Prepare the weights and the memory limit, and find accelerate's fastest variant."""
        folder = self.work / model
        if not folder.exists():
            write_model(model, folder)
        nbytes = (folder / "model.safetensors").stat().st_size
        limit = self.args.limit or nbytes // 2
        self.document["limits"][model] = {"model_bytes": nbytes, "limit_bytes": limit}
        if self.args.variant != "auto":
            self.document["variants"][model] = {"chosen": self.args.variant}
        if "chosen" in self.document["variants"].get(model, {}) or not self._with_peer():
            return
        if not (
            self._numpy(model) / "index.json"
        ).exists():  # written without a limit: it needs the whole model
            say(f"{model}: writing accelerate's own offload files")
            run_worker(self._peer(model, 1, 4, 4, "folder"), None, self.args.timeout, self.work / "peer.log")
        found: dict[str, Any] = {}
        for variant in VARIANTS:
            result = self._worker(model, self._peer(model, EQUAL_BATCHES[0], 16, 2, variant))
            found[variant] = statistics.median(result["steps_s"]) if "steps_s" in result else result
            say(f"{model}: accelerate, {variant}: {found[variant]}")
        times = {variant: seconds for variant, seconds in found.items() if isinstance(seconds, float)}
        chosen = min(times, key=lambda variant: times[variant]) if times else VARIANTS[0]
        self.document["variants"][model] = {"chosen": chosen, "step_s": found}
        save(NAME, self.document, self.path)

    def measure(self, run: Run, repeat: int) -> None:
        """Make a measurement unless it exists or is known to fail, and save all results."""
        found = self.document["runs"].setdefault(run.key, [])
        if len(found) > repeat or (found and "failed" in found[-1]) or (not self._with_peer(run)):
            return
        if smaller := self._failed_smaller(run):
            say(f"{run.key}: skipped, because {smaller} failed")
            return
        began = time.perf_counter()
        job = self._job(run)
        if run.engine == "accelerate":
            words = self._peer_words(job | {"variant": self.document["variants"][run.model]["chosen"]})
        else:
            words = [sys.executable, str(PEERS / "flexgen_worker.py"), json.dumps(job)]
        result = self._worker(run.model, words)
        if "failed" not in result:
            result["step_s"] = statistics.median(result["steps_s"])
            result["total_s"] = result["prefill_s"] + (
                sum(result["steps_s"]) if self.args.full else (run.gen_len - 1) * result["step_s"]
            )
            result["tokens_per_s"] = run.rows * run.gen_len / result["total_s"]
        result["wall_s"] = time.perf_counter() - began
        found.append(result)
        say(f"repeat {repeat + 1} {run.key}: {brief(result)}")
        self.document["figures"] = self.figures()
        save(NAME, self.document, self.path)

    def _job(self, run: Run) -> dict[str, Any]:
        return run._asdict() | {
            "model": str(self.work / run.model),
            "folder": str(self.work / "flexgen" if run.engine == "flexgen" else self._numpy(run.model)),
            "limit": self.document["limits"][run.model]["limit_bytes"],
            "steps": 0 if self.args.full else self.args.steps,
        }

    def _peer(self, model: str, batch: int, prompt_len: int, steps: int, variant: str) -> list[str]:
        run = Run(model, "accelerate", prompt_len, steps + 1, prompt_len, batch)
        return self._peer_words(self._job(run) | {"steps": steps, "variant": variant})

    def _peer_words(self, job: dict[str, Any]) -> list[str]:
        return [self.args.peer_python, str(PEERS / "accelerate_worker.py"), json.dumps(job)]

    def _worker(self, model: str, words: list[str]) -> dict[str, Any]:
        limit = self.document["limits"][model]["limit_bytes"]
        try:
            group: Any = MemoryGroup(limit)
            with group:
                return run_worker(words, group, self.args.timeout, self.work / "worker.log")
        except OSError as error:
            say(f"no memory control group ({error}): the page cache is not limited")
            return run_worker(words, None, self.args.timeout, self.work / "worker.log")

    def _numpy(self, model: str) -> Path:
        return self.work / f"{model}-accelerate"

    def _with_peer(self, run: Run | None = None) -> bool:
        return bool(self.args.peer_python) or (run is not None and run.engine == "flexgen")

    def _failed_smaller(self, run: Run) -> str | None:
        """A run that was too large and differs only by fewer prompts. `run` is then too large as well."""
        for other in self._case(run.model, f"{run.prompt_len}/{run.gen_len}"):
            same = other._replace(batch=0, batches=run.batches) == run._replace(batch=0)
            if same and other.batch < run.batch:
                results = self.document["runs"].get(other.key, [])
                if results and results[-1].get("too_large"):
                    return other.key
        return None

    # Results

    def _figures(self, run: Run) -> dict[str, float]:
        good = [r for r in self.document["runs"].get(run.key, []) if "failed" not in r]
        names = ("prefill_s", "step_s", "total_s", "tokens_per_s")
        return {name: statistics.median(r[name] for r in good) for name in names} if good else {}

    def figures(self) -> dict[str, Any]:
        """The medians of the ratios of all repeats. Above 1, flexgen (or int4) is faster."""
        figures: dict[str, Any] = {}
        for model in self.document["limits"]:
            for batch in self.args.equal_batches:
                plain = Run(model, "flexgen", 128, 32, 128, batch)
                peer = plain._replace(engine="accelerate")
                coded = plain._replace(codec="int4")
                step = ("step_s", "prefill_s")
                self._put(figures, f"{model}, batch {batch}, accelerate / flexgen", peer, plain, step)
                self._put(figures, f"{model}, batch {batch}, bfloat16 / int4", plain, coded, step)
            for case in CASES[2:]:
                best = self._best(model, case)
                if len(best) == 2:
                    name = f"{model}, best of {case}, accelerate / flexgen"
                    self._put(figures, name, best["accelerate"], best["flexgen"], ("tokens_per_s",))
        return figures

    def _put(self, figures: dict[str, Any], name: str, slow: Run, fast: Run, parts: tuple[str, ...]) -> None:
        """The ratios of two runs by part: slow / fast for times, fast / slow for throughputs."""
        sides = [
            [r for r in self.document["runs"].get(run.key, []) if "failed" not in r] for run in (slow, fast)
        ]
        pairs = list(zip(*sides, strict=False))
        if not pairs:
            return
        figures[name] = {
            part: statistics.median(
                b[part] / a[part] if part == "tokens_per_s" else a[part] / b[part] for a, b in pairs
            )
            for part in parts
        }
        figures[name] |= {"runs": [slow.key, fast.key], "repeats": len(pairs)}
        a, b = (pairs[0][side]["tokens"] for side in (0, 1))
        figures[name]["same_tokens"] = (
            f"{sum(x == y for x, y in zip(a, b, strict=False))} of {min(len(a), len(b))}"
        )


def run_worker(words: list[str], group: MemoryGroup | None, timeout: float, log: Path) -> dict[str, Any]:
    """The JSON on a worker's last line, or {"failed": reason} if it failed before that."""
    dropped = drop_caches()
    # The peer's Python has its own packages. No process may use the network.
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if words[0] != sys.executable:
        env.pop("PYTHONPATH", None)
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                group.command(words) if group else words,
                stdout=subprocess.PIPE, stderr=errors, env=env, timeout=timeout, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            # With too little memory, a process may also slow down: the kernel drops and rereads its code pages.
            return {"failed": f"stopped after {timeout:g} s", "too_large": True}
    if group and group.kills:
        return {
            "failed": f"killed, out of memory at the limit of {format_bytes(group.limit)}",
            "too_large": True,
        }
    if done.returncode:
        said = [line for line in log.read_text().splitlines() if line.strip()]
        return {"failed": f"exit status {done.returncode}: {said[-1] if said else ''}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {
        "group_peak_bytes": group.peak_bytes if group else None,
        "limited": group is not None,
        "caches_dropped": dropped,
    }


def brief(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    times = f"prefill {result['prefill_s']:.2f} s, step {result['step_s']:.3f} s"
    memory = f"peak RSS {format_bytes(result['peak_rss_bytes'])} (baseline {format_bytes(result['baseline_bytes'])})"
    return f"{times}, {result['tokens_per_s']:.2f} tokens/s, {memory}, {result['wall_s']:.0f} s in total"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--peer-python", help="Python with accelerate; without it, only flexgen is measured")
    add("--work-dir", required=True)
    add("--repeats", type=int, default=5)
    add("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    add(
        "--model",
        choices=SHAPES,
        action="append",
        help=f"run only this model (default: {' and '.join(MODELS)})",
    )
    add("--batches", type=int, nargs="+", default=[4, 16, 32, 64], help="batches for accelerate")
    add(
        "--blocks",
        nargs="+",
        default=["16x1", "32x1", "64x1", "32x4"],
        help="batch x number of batches, for flexgen",
    )
    add("--equal-batches", type=int, nargs="+", default=list(EQUAL_BATCHES))
    add(
        "--variant",
        choices=("auto", *VARIANTS),
        default="auto",
        help="variant of accelerate; auto: the fastest",
    )
    add("--steps", type=int, default=4, help="decode steps that are timed")
    add("--full", action="store_true", help="run all tokens instead of extrapolating")
    add("--limit", type=parse_bytes, help="memory limit of each process (default: half of the model)")
    add("--timeout", type=float, default=180, help="seconds after which a process is stopped")
    add("--resume", action="store_true", help="continue with the existing results")
    add("--out", help="write the results to this file")
    return parser


if __name__ == "__main__":
    main()
