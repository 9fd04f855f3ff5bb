"""The benefit of prompts that enter when rows end: tokens/s with it, and block after block.

    python benchmarks/refill.py

Answers have different lengths: geometric (a mean of 13 tokens, at most 64), uniform (1 to 64) and fixed (64). Each
row ends at its length (`max_new_tokens` per prompt). With refill, one call gets all prompts: they enter in batches
that are free ("refill"), or in the place of each row that has ended ("places", with `prefill_rows`). Without, each
block of 4 x 16 prompts is a call, which ends with its longest answer ("blocks"). Rows that remain in a block are
still compacted.

The device is emulated, with a link of 256 MiB/s, and all weights are in host memory. The model has four layers of a
small OPT shape with random weights in float32: a pass takes as long as the link takes for its weights. One thread
computes, so that another core is free for the copies of the link. Layers are whole in all cases (`sep_layer=False`):
the load of a whole layer takes longer than the end of a pass, at which the cells of the next one are chosen.
`link_share` is the share of the time in which the link copies. The rest is lost at the ends of passes and runs.

With --predict, the result also has the predicted tokens/s of each case, from the mean length of its answers alone
(`Workload.mean_new`). The machine is measured before and after the runs.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import numpy as np
import torch
from record import compared, interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe.measured import measured
from flexgen.results.trace import LaneName
from flexgen.workload import Workload

SHAPE = dict(
    vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, ffn_dim=1024,
    word_embed_proj_dim=256, max_position_embeddings=128,
)  # fmt: skip
DEVICE = "emulated:link=256MiB"
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=4, weights={"cpu": 100}, sep_layer=False)
MOST = 64
MEAN = 13


def answers(kind: str, prompts: int) -> list[int]:
    """The number of new tokens of each prompt."""
    rng = np.random.default_rng(0)
    match kind:
        case "geometric":
            return rng.geometric(1 / MEAN, size=prompts).clip(1, MOST).tolist()
        case "uniform":
            return rng.integers(1, MOST + 1, size=prompts).tolist()
        case _:
            return [MOST] * prompts


def run(model: OptLM, prompts: np.ndarray, counts: list[int], at_a_time: int) -> dict[str, float]:
    seconds, passes, new_tokens, link = 0.0, 0, 0, 0.0
    for first in range(0, len(prompts), at_a_time):
        some = slice(first, first + at_a_time)
        model.generate(prompts[some], counts[some], stop=())
        assert model.stats is not None
        seconds += model.stats.timing.total
        passes += sum(model.stats.timing.ran)
        new_tokens += model.stats.new_tokens
        link += model.stats.timing.trace.busy()[LaneName.TO_DEVICE]
    assert new_tokens == sum(counts)
    return {
        "tokens_s": new_tokens / seconds,
        "seconds": seconds,
        "passes": passes,
        "link_share": link / seconds,
    }


def predicted(model: OptLM, counts: list[int], prompt_len: int, at_a_time: int, machine: Hardware) -> float:
    """The predicted tokens/s of calls of `at_a_time` prompts, from the mean number of new tokens."""
    workload = Workload(prompt_len, MOST, at_a_time, mean_new=float(np.mean(counts)))
    return predict(model.spec, model.policy, machine, workload, dtype="float32").report.throughput_tokens_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--answers", nargs="+", default=["geometric", "uniform", "fixed"])
    parser.add_argument("--prefill-rows", type=int, default=16, help='prefill_rows of the policy of "places"')
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--predict", action="store_true", help="also predict each case")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = np.random.default_rng(1).integers(4, SHAPE["vocab_size"], size=(args.prompts, args.prompt_len))
    figures, ratios, predictions = {}, {}, {}
    machines = [measured(DEVICE, again=True)] if args.predict else []
    options = dict(device=DEVICE, dtype="float32", weights="dummy", progress=False)
    by_place = POLICY.replace(prefill_rows=args.prefill_rows)
    with (
        OptLM(OPTConfig(**SHAPE), POLICY, **options) as by_batch,
        OptLM(OPTConfig(**SHAPE), by_place, **options) as places,
    ):
        models = {"blocks": by_batch, "refill": by_batch, "places": places}
        for model in (by_batch, places):
            model.generate(prompts[:16], 2, stop=())
        for kind in args.answers:
            counts = answers(kind, args.prompts)
            sizes = {name: POLICY.block_size if name == "blocks" else args.prompts for name in models}
            cases = {name: partial(run, models[name], prompts, counts, size) for name, size in sizes.items()}
            found = figures[kind] = interleaved(cases, args.repeats)
            speeds = {name: found[name]["tokens_s"]["median"] for name in cases}
            ratios[kind] = {
                name: speed / speeds["blocks"] for name, speed in speeds.items() if name != "blocks"
            }
            print(f"{kind}: tokens/s by those of block after block: {ratios[kind]}")
            if not args.no_save:  # later cases may be interrupted
                save("refill", {"arguments": vars(args), "figures": figures, "ratios": ratios})
        if args.predict:
            machines.append(measured(DEVICE, again=True))
        for kind, name in itertools.product(figures if args.predict else (), models):
            size = POLICY.block_size if name == "blocks" else args.prompts
            counts = answers(kind, args.prompts)
            expected = [predicted(models[name], counts, args.prompt_len, size, each) for each in machines]
            took = figures[kind][name]["tokens_s"]["median"]
            predictions[f"{kind}, {name}"] = compared(f"{kind}, {name}", expected, took)
    if args.predict and not args.no_save:
        found_all = {"figures": figures, "ratios": ratios, "predicted": predictions}
        save("refill", {"arguments": vars(args), **found_all})


if __name__ == "__main__":
    main()
