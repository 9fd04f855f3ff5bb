"""Compare the speed of this checkout with another checkout of flexgen.

    python benchmarks/versions.py CHECKOUT --offload-dir DIR

Each checkout runs in its own process, and each case runs alternately in both. Both need their compiled kernels
(`pip install --editable .` in each). The cases are: eight layers of the Llama-1B shape in host memory (`memory`),
the same with weights on disk (`disk`), a tiny model, whose time is the overhead of the host (`host`), and a search
for OPT-30B on the preset `t4` (`search`). A ratio is the median over the repeats of the other checkout's seconds over
this one's: above 1, this one is faster. Keep the machine idle.
"""

from __future__ import annotations

import argparse
import importlib
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

HERE = Path(__file__).resolve().parents[1]
IN_MEMORY = {kind: {"cpu": 100} for kind in ("weights", "cache", "activations")}
PROMPT_LEN = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="the root of the other checkout")
    parser.add_argument("--offload-dir", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.offload_dir)
        return
    record = importlib.import_module("record")
    workers = {"other": Worker(args.checkout, args.offload_dir), "this": Worker(HERE, args.offload_dir)}
    figures: dict[str, Any] = {}
    for case in args.case or CASES:
        for worker in workers.values():
            worker.ask(case)  # warms up
        found = record.interleaved(
            {name: partial(worker.ask, case) for name, worker in workers.items()}, args.repeats
        )
        pairs = {part: (found["other"][part]["all"], found["this"][part]["all"]) for part in found["this"]}
        ratios = {
            part: statistics.median(a / b for a, b in zip(*both, strict=True)) for part, both in pairs.items()
        }
        figures[case] = {**found, "ratio": ratios}
        print(f"{case:<8}" + "".join(f"{part:>12}{ratio:>7.2f}" for part, ratio in ratios.items()))
    for worker in workers.values():
        worker.end()
    print(record.save("versions", {"figures": figures}))


class Worker:
    """A process that imports flexgen from one checkout."""

    def __init__(self, checkout: Path, offload_dir: str) -> None:
        own = Path(offload_dir) / f"flexgen-versions-{len(os.fspath(checkout))}"
        command = [sys.executable, __file__, ".", "--serve", "--offload-dir", os.fspath(own)]
        paths = [os.fspath(checkout.resolve())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def ask(self, case: str) -> dict[str, float]:
        """The seconds of a case by part."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(case, file=self._process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def end(self) -> None:
        self._process.communicate("")


def serve(offload_dir: str) -> None:
    """For each line of standard input, run the case of that name and print a line of JSON."""
    run: dict[str, Callable[[], dict[str, float]]] = {}
    for line in sys.stdin:
        case = line.strip()
        if case not in run:
            run[case] = CASES[case](offload_dir)
        print(json.dumps(run[case]()), flush=True)


def generating(policy: Mapping[str, Any], rows: int, tokens: int, tiny: bool, offload_dir: str) -> Any:
    import numpy as np
    from transformers import LlamaConfig

    from flexgen import OptLM, Policy

    sizes = (64, 128, 4, 2) if tiny else (2048, 8192, 32, 8)
    hidden, wide, heads, kv_heads = sizes
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=8,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    model = OptLM(
        config, Policy(gpu_batch_size=rows, **policy), device="cpu", dtype="float32" if tiny else "bfloat16",
        weights="dummy", offload_dir=offload_dir, progress=False,
    )  # fmt: skip
    length = 4 if tiny else PROMPT_LEN
    prompts = np.random.default_rng(0).integers(4, 30_000, size=(rows, length))

    def run() -> dict[str, float]:
        _, report = model.generate(prompts, tokens, stop=(), stats=True)
        return {"prefill_s": report.prefill_s, "decode_s": report.decode_s}

    return run


def searching(offload_dir: str) -> Any:
    from flexgen import Workload
    from flexgen.models import open_model

    def from_one_of(name: str, *modules: str) -> Any:
        for module in modules:  # old and new locations
            try:
                return getattr(importlib.import_module(module), name)
            except ModuleNotFoundError:
                continue
        raise ModuleNotFoundError(f"none of {modules} exists")

    find_policy = from_one_of("find_policy", "flexgen.planning.search", "flexgen.search.find")
    hardware = from_one_of("Hardware", "flexgen.planning.hardware", "flexgen.predict.hardware").preset("t4")
    spec, _ = open_model("opt-30b", "dummy")

    def run() -> dict[str, float]:
        began = time.perf_counter()
        find_policy(spec, hardware, Workload(512, 32, 768))
        return {"search_s": time.perf_counter() - began}

    return run


CASES: dict[str, Callable[[str], Any]] = {
    "memory": partial(generating, IN_MEMORY, 8, 24, False),
    "disk": partial(generating, IN_MEMORY | {"weights": {"disk": 100}}, 32, 6, False),
    "host": partial(generating, IN_MEMORY, 1, 256, True),
    "search": searching,
}


if __name__ == "__main__":
    main()
