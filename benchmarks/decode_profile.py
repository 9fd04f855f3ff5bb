"""The time of a decode step of a small batch by kernel, with the weights in memory, and the Python code between them.

    python benchmarks/decode_profile.py --work-dir DIR [--model qwen3-30b-a3b-cut] [--format bf16 int4] [--batch 1]

DIR has the models of cpu_peers.py. For each number format, the script decodes a few tokens and times each call of the
recorded cells (`flexgen.kernels.tape`). Times are medians of the steps, in ms, so their sum may differ from the mean
step. For a product, the result also has its share of the read bandwidth, which is measured before and after each
format. Three parts are not kernels:

- `between calls`: the time in a pass in which no kernel runs. It includes the start and the end of the threads' work.
- `between passes`: the time from the last kernel of a pass to the first kernel of the next one. Python code chooses
  and stores the ids, and computes the embedding.
- `recording`: the time before the first pass, in which the calls are recorded, and after the last one, divided by the
  number of steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_peers import FORMATS, MODELS, PROMPT_LEN, instruction_sets, read_bandwidth
from record import save

from flexgen import OptLM, Policy
from flexgen.kernels.tape import Profile, profiled

BITS = {"int8": 8.5, "int4": 4.5, "int8_a8": 8.5, "int4_a8": 4.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True)
    add("--model", choices=MODELS, default="llama-1b-32k")
    add("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    add("--batch", type=int, default=1)
    add("--new", type=int, default=24, help="new tokens")
    add("--threads", type=int, default=os.cpu_count())
    add("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for form in args.format:
        found[form] = profile(form, args)
        show(form, found[form])
    document = {"model": args.model, "batch": args.batch, "prompt_len": PROMPT_LEN, "formats": found}
    print(save("decode_profile", {"instruction_sets": instruction_sets(), **document}, args.out))


def profile(form: str, args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of a step and of its parts."""
    ids = np.random.default_rng(0).integers(4, 30_000, size=(args.batch, PROMPT_LEN))
    policy = Policy(
        gpu_batch_size=args.batch,
        weights={"cpu": {"percent": 100, "codec": form if form in BITS else "none"}},
        cache={"cpu": 100},
        activations={"cpu": 100},
    )
    dtype = "float16" if form == "fp16" else "bfloat16"
    with OptLM(args.work_dir / args.model, policy, device="cpu", dtype=dtype, progress=False) as model:

        def step() -> float:
            """The seconds of a step."""
            model.generate(ids, args.new, stop=())
            assert model.stats is not None
            return model.stats.timing.decode / (args.new - 1)

        step()
        read = [read_bandwidth()]
        plain = step()
        with profiled() as replays:
            timed = step()
        read.append(read_bandwidth())
        weight_bytes = sum(model.placement.nbytes.values())
    bandwidth = statistics.median(read)
    each = len(replays) // (args.new - 1)
    passes = [replays[n : n + each] for n in range(0, len(replays), each)]
    parts = by_call(passes) | around(passes, timed, args.new - 1)
    figures: dict[str, Any] = {
        "read_bytes_per_s": bandwidth,
        "step_s": plain,
        "timed_step_s": timed,
        "read_share": weight_bytes / plain / bandwidth,
        "parts": {name: {"s": seconds, "calls": calls} for name, (seconds, calls) in parts.items()},
    }
    for name, part in figures["parts"].items():
        if values := product_values(name):
            nbytes = part["calls"] * values * BITS.get(form, 16) / 8
            part["read_share"] = nbytes / part["s"] / bandwidth
    return figures


def by_call(passes: list[list[Profile]]) -> dict[str, tuple[float, int]]:
    """By name of a call, its median seconds in a pass, and its number in a pass. Only the last half is used."""
    half = passes[len(passes) // 2 :]
    sums: list[Counter[str]] = [Counter() for _ in half]
    for total, own in zip(sums, half, strict=True):
        for name, seconds in all_calls(own):
            total[name] += seconds
    calls = Counter(name for name, _ in all_calls(half[-1]))
    return {name: (statistics.median(total[name] for total in sums), n) for name, n in calls.items()}


def all_calls(replays: list[Profile]) -> list[tuple[str, float]]:
    return [call for replay in replays for call in replay.calls]


def around(passes: list[list[Profile]], step: float, steps: int) -> dict[str, tuple[float, int]]:
    """The parts of a step that are not calls, in the form of `by_call`. step: the mean seconds of a step."""
    starts, ends = [own[0].start for own in passes], [own[-1].end for own in passes]
    spans = [end - start for start, end in zip(starts, ends, strict=True)]
    outside = [
        span - sum(seconds for _, seconds in all_calls(own)) for span, own in zip(spans, passes, strict=True)
    ]
    gap = statistics.median(start - end for start, end in zip(starts[1:], ends, strict=False))
    recording = step * steps - (ends[-1] - starts[0])
    return {
        "between calls": (statistics.median(outside), 1),
        "between passes": (gap, 1),
        "recording": (recording / steps, 1),
    }


def product_values(name: str) -> int:
    """The values of the matrices of a call "product of 2048 with 512 512"; 0 for other calls."""
    words = name.split()
    return int(words[2]) * sum(map(int, words[4:])) if words[0] == "product" else 0


def show(form: str, found: dict[str, Any]) -> None:
    print(
        f"{form}: step {1e3 * found['step_s']:.2f} ms (timed {1e3 * found['timed_step_s']:.2f}), "
        f"{found['read_share']:.0%} of {found['read_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    for name, part in sorted(found["parts"].items(), key=lambda item: -item[1]["s"]):
        share = f"{part['read_share']:>6.0%}" if "read_share" in part else ""
        whole = part["s"] / found["timed_step_s"]
        print(f"  {name:<40}{part['calls']:>5}{1e3 * part['s']:>9.3f} ms{whole:>7.1%}{share}")


if __name__ == "__main__":
    main()
