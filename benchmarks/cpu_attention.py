"""Attention on the host beside the device: decode seconds of each order, over the lanes alone.

    python benchmarks/cpu_attention.py

Weights stream from the CPU tier over a limited link and the cache is attended on the host, on the emulated device,
which computes on the same cores: what no order can beat there is the larger of the link alone and of all
arithmetic, products and attention. Layers of the OPT shape with random weights in bfloat16. The vocabulary is cut
so that the head is a few percent of so few layers, as it is of a whole model: a unit that is several times as
long as the others is not hidden behind the two or three that the slots hold.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial

import numpy as np
from record import interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.trace import LaneName, Phase

ORDERS = ("overlap_cpu_attention", "overlap_multi_batch", "normal")


def decode(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    """Seconds of all new tokens but the first."""
    model.generate(prompts, tokens, stop=())
    assert model.stats is not None
    return {"decode": model.stats.timing.decode}


def alone(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    """Seconds of the decode that the link and all arithmetic would take alone."""
    lanes = model.lane_seconds(prompts, tokens)[Phase.DECODE]
    return {"loading": lanes[LaneName.TO_DEVICE], "arithmetic": lanes[LaneName.COMPUTE]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--link", default="512MiB", help="of the emulated device, bytes/s (default: 512MiB)")
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=1024, help="a multiple of 64 (default: 1024)")
    add("--vocab", type=int, default=4096)
    add("--batch", type=int, default=32, help="prompts of a batch (default: 32)")
    add("--batches", type=int, default=4)
    add("--prompt-len", type=int, default=32)
    add("--gen-len", type=int, default=6)
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = OPTConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        word_embed_proj_dim=args.hidden,
    )
    policy = Policy(
        gpu_batch_size=args.batch,
        num_gpu_batches=args.batches,
        weights={"cpu": 100},
        cache={"cpu": 100},
        sep_layer=False,
    )
    prompts = np.random.default_rng(0).integers(4, args.vocab, size=(policy.block_size, args.prompt_len))
    with contextlib.ExitStack() as stack:
        cases = {}
        for order in ORDERS:
            model = stack.enter_context(
                OptLM(
                    config,
                    policy,
                    device=f"emulated:link={args.link}",
                    dtype="bfloat16",
                    weights="dummy",
                    order=order,
                )
            )
            model.generate(prompts[:1, :4], 2, stop=())
            cases[order] = partial(decode, model, prompts, args.gen_len)
            if order == ORDERS[0]:
                cases["alone"] = partial(alone, model, prompts, args.gen_len)
        figures = interleaved(cases, args.repeats)
    loading, arithmetic = (figures["alone"][lane]["median"] for lane in ("loading", "arithmetic"))
    print(f"alone: loading {loading:.2f}s, arithmetic {arithmetic:.2f}s")
    print(f"{'order':<24}{'decode':>10}{'/ larger':>10}{'/ sum':>10}")
    for order in ORDERS:
        taken = figures[order]["decode"]["median"]
        figures[order]["over_larger"] = taken / max(loading, arithmetic)
        figures[order]["over_sum"] = taken / (loading + arithmetic)
        ratios = figures[order]["over_larger"], figures[order]["over_sum"]
        print(f"{order:<24}{taken:>9.2f}s{ratios[0]:>10.2f}{ratios[1]:>10.2f}")
    print(save("cpu_attention", {"policy": policy.to_dict(), "shape": vars(args), "figures": figures}))


if __name__ == "__main__":
    main()
