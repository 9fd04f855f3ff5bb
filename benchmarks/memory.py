"""Compare measured memory with the plan: the peak resident set of a new process, minus its initial size.

    python benchmarks/memory.py --work-dir DIR

Each case is a separate process. It imports torch and flexgen, runs the case "tiny" once (threads and the one-time
setup of libraries do not belong to a model) and records its resident set as the base. Then it opens a model with
random weights in bfloat16 and runs one call. The peak beyond the base is the larger one of opening, which writes the
weights to disk, and of the call. It must be within a tenth of the plan, or within 20 MB if that is more. If the plan
is too small, the system may kill the process; if it is too large, memory is wasted. DIR contains the files of a case,
at most 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import interleaved, save
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig

from flexgen import OptLM, Policy, Tier
from flexgen.memory.cpu import peak_resident_bytes, reset_peak_resident_bytes, resident_bytes

SHARE, LEAST = 0.1, 20e6
CPU, DISK = {"cpu": 100}, {"disk": 100}
LLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    vocab_size=128_256,
    tie_word_embeddings=True,
)
OPT = OPTConfig(
    hidden_size=2048, ffn_dim=8192, num_hidden_layers=8, num_attention_heads=32, word_embed_proj_dim=2048
)  # fmt: skip
TINY = OPTConfig(
    hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64
)


class Case(NamedTuple):
    model: str | PreTrainedConfig
    policy: Policy
    prompt_len: int
    new_tokens: int


def _policy(batch: int, batches: int = 1, **splits: Any) -> Policy:
    given: dict[str, Any] = {"weights": CPU, "cache": CPU, "activations": CPU} | splits
    return Policy(gpu_batch_size=batch, num_gpu_batches=batches, **given)


INT4 = {"cpu": {"percent": 100, "codec": "int4"}}
CASES = {
    "weights on disk": Case(OPT, _policy(4, weights=DISK), 64, 4),
    "weights on disk, large vocabulary": Case(LLAMA, _policy(4, weights=DISK), 64, 4),
    "weights in memory": Case("opt-1.3b", _policy(4), 64, 4),
    "weights in memory, int4": Case("opt-1.3b", _policy(4, weights=INT4), 64, 4),
    "weights half and half": Case(OPT, _policy(4, 2, weights={"cpu": 50, "disk": 50}), 64, 4),
    "weights on disk, large head in memory": Case(LLAMA, _policy(4, weights={"cpu": 40, "disk": 60}), 64, 4),
    "cache on disk": Case("opt-125m", _policy(32, 4, cache=DISK), 128, 4),
    "cache in memory, large batch": Case("opt-125m", _policy(64, 2), 128, 4),
    "activations on disk": Case("opt-125m", _policy(32, 4, activations=DISK), 128, 4),
    "long prompts": Case(LLAMA, _policy(1, weights=DISK), 2048, 2),
    "all on disk": Case("opt-350m", _policy(16, 2, weights=DISK, cache=DISK, activations=DISK), 128, 4),
    "tiny": Case(TINY, _policy(2, weights=DISK, cache=DISK), 8, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    parser.add_argument("--out", help="write the results to this file")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    if args.worker:
        print(json.dumps(measure(CASES[args.worker], args.work_dir)))
        return
    cases = {name: partial(in_process, name, args.work_dir) for name in args.case or CASES}
    figures = interleaved(cases, args.repeats)
    columns = ("weights", "base", "plan", "opening", "call", "peak")
    print(
        f"{'MB':<36}" + "".join(f"{column:>10}" for column in columns) + f"{'peak/plan':>12}{'allowed':>10}"
    )
    for name, found in figures.items():
        sizes = {column: found[f"{column}_bytes"]["median"] for column in columns}
        found["peak_per_plan"] = sizes["peak"] / sizes["plan"]
        found["allowed_bytes"] = max(SHARE * sizes["plan"], LEAST)
        found["within_limit"] = abs(sizes["peak"] - sizes["plan"]) <= found["allowed_bytes"]
        line = "".join(f"{size / 1e6:>10.0f}" for size in sizes.values())
        line += f"{found['peak_per_plan']:>12.2f}{found['allowed_bytes'] / 1e6:>10.0f}"
        print(f"{name:<36}{line}{'' if found['within_limit'] else '  OUTSIDE'}")
    rule = (
        f"|peak - plan| <= {SHARE:.0%} of the plan or {LEAST / 1e6:.0f} MB; peak = max(opening, call) - base"
    )
    print(save("memory", {"rule": rule, "figures": figures}, Path(args.out) if args.out else None))


def in_process(name: str, work_dir: str) -> dict[str, float]:
    """Run the case in a separate process."""
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:  # without the weights of earlier processes
        words = [sys.executable, __file__, "--work-dir", folder, "--worker", name]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}: the process ended with status {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(case: Case, folder: str) -> dict[str, float]:
    """Bytes before the model is opened, in the plan, and at the peaks of opening it and of a call."""
    ids = np.random.default_rng(0).integers(4, 30_000, size=(case.policy.block_size, case.prompt_len))
    opening: dict[str, Any] = dict(
        device="cpu", dtype="bfloat16", weights="dummy", offload_dir=folder, progress=False
    )
    first = CASES["tiny"]
    with OptLM(first.model, first.policy, **opening) as model:
        model.generate(ids[: first.policy.block_size, : first.prompt_len], first.new_tokens, stop=())
    base = resident_bytes()
    reset_peak_resident_bytes()
    with OptLM(case.model, case.policy, **opening) as model:
        opened = peak_resident_bytes()
        reset_peak_resident_bytes()
        model.generate(ids, case.new_tokens, stop=())
        assert model.stats is not None
        call, plan = peak_resident_bytes(), model.stats.plan.on(Tier.CPU)
        weights = sum(model.placement.nbytes.values())
    return {
        "weights_bytes": weights,
        "base_bytes": base,
        "plan_bytes": plan,
        "opening_bytes": opened,
        "call_bytes": call,
        "peak_bytes": max(opened, call) - base,
    }


if __name__ == "__main__":
    main()
