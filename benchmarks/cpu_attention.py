"""Attention on the host beside the device: decode seconds of each order, over the lanes alone.

    python benchmarks/cpu_attention.py

Weights stream from the CPU tier over a limited link and the cache is attended on the host, on the emulated device,
which computes on the same cores: what no order can beat there is the larger of the link alone and of all
arithmetic, products and attention. Layers of the OPT-1.3B shape with random weights in bfloat16.
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


def run(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    """Seconds of the decode, and what its lanes take alone: the whole less the prefill."""
    model.generate(prompts, tokens, stop=())
    assert model.stats is not None
    lanes = model.lane_seconds(prompts, tokens)[Phase.DECODE]
    arithmetic = lanes[LaneName.COMPUTE] + lanes[LaneName.HOST]
    bound = max(arithmetic, lanes[LaneName.TO_DEVICE])
    decode = model.stats.timing.decode
    alone = {str(lane): seconds for lane, seconds in lanes.items()}
    return {"over bound": decode / bound, "decode": decode, "arithmetic": arithmetic} | alone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--link", default="4GiB", help="of the emulated device, bytes/s (default: 4GiB)")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=2048, help="a multiple of 64 (default: 2048)")
    add("--batch", type=int, default=16, help="prompts of a batch (default: 16)")
    add("--batches", type=int, default=6)
    add("--prompt-len", type=int, default=256)
    add("--gen-len", type=int, default=16)
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = OPTConfig(
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
    prompts = np.random.default_rng(0).integers(4, 50_000, size=(policy.block_size, args.prompt_len))
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
            cases[order] = partial(run, model, prompts, args.gen_len)
        figures = interleaved(cases, args.repeats)
    print(f"{'order':<24}{'decode':>10}{'over bound':>12}")
    for order, found in figures.items():
        print(f"{order:<24}{found['decode']['median']:>9.2f}s{found['over bound']['median']:>12.2f}")
    print(save("cpu_attention", {"policy": policy.to_dict(), "shape": vars(args), "figures": figures}))


if __name__ == "__main__":
    main()
