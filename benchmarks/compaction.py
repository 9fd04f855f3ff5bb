"""The benefit of compaction, which removes finished rows from their batches: tokens/s with and without it.

    python benchmarks/compaction.py

Rows end at times drawn uniformly from 1 to --gen-len, in place of texts of different lengths (`max_new_tokens` per
prompt). Both sides have the same times, the same policy and the same ids, and stop with the last row; without
compaction, all rows are computed until then. The model has eight layers of the OPT-1.3B shape
with random weights in bfloat16, on the CPU, with the cache in memory and on disk (in --offload-dir, by default a
temporary directory).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np
from record import interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.schedule.admission import regrouped

CASES = {
    "cache in memory": Policy(gpu_batch_size=16, num_gpu_batches=4, weights={"cpu": 100}, cache={"cpu": 100}),
    "cache on disk": Policy(gpu_batch_size=16, num_gpu_batches=4, weights={"cpu": 100}, cache={"disk": 100}),
    "one batch": Policy(gpu_batch_size=32, weights={"cpu": 100}, cache={"cpu": 100}),
}


def all_or_nothing(batches: list[list[int]], stopped: list[bool], *_: object) -> list[list[int]] | None:
    """The rule without compaction: a block ends when its last row has stopped."""
    return [] if all(stopped) else None


def run(
    model: OptLM, prompts: np.ndarray, times: np.ndarray, rule: Callable[..., object]
) -> dict[str, float]:
    with mock.patch("flexgen.runtime.tokens.regrouped", rule):
        model.generate(prompts, times, stop=())
    assert model.stats is not None
    assert model.stats.new_tokens == times.sum()
    timing = model.stats.timing
    return {
        "decode_s": timing.decode,
        "total_s": timing.total,
        "tokens_s": model.stats.new_tokens / timing.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offload-dir", metavar="DIR")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--gen-len", type=int, default=64)
    parser.add_argument("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    config = OPTConfig(
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
    )
    figures = {}
    for name in args.case or CASES:
        policy, random = CASES[name], np.random.default_rng(0)
        prompts = random.integers(4, 50_000, size=(policy.block_size, args.prompt_len))
        times = random.integers(1, args.gen_len + 1, size=policy.block_size)
        with OptLM(
            config, policy, device="cpu", dtype="bfloat16", weights="dummy", offload_dir=args.offload_dir
        ) as model:
            model.generate(prompts[:1, :4], 1, stop=())
            cases = {
                "with": partial(run, model, prompts, times, regrouped),
                "without": partial(run, model, prompts, times, all_or_nothing),
            }
            figures[name] = interleaved(cases, args.repeats)
        if not args.no_save:  # later cases may be interrupted
            model_name = f"{args.layers} layers of the OPT-1.3B shape, bfloat16"
            print(save("compaction", {"model": model_name, "figures": figures}))
    print(f"{'case':<20}{'tokens/s, with over without':>28}")
    for name, found in figures.items():
        ratio = found["with"]["tokens_s"]["median"] / found["without"]["tokens_s"]["median"]
        print(f"{name:<20}{ratio:>28.2f}")


if __name__ == "__main__":
    main()
