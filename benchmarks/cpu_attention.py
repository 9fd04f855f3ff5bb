"""Attention on the host, overlapped with the device: the decode time of each order, relative to the lanes alone.

    python benchmarks/cpu_attention.py

Weights are streamed from the CPU tier over a limited link, and the host computes attention. The emulated device
computes on the same cores, so the lower bound of all orders is the larger one of the link alone and of all arithmetic
(products and attention). The layers have the OPT shape with random weights in bfloat16. The vocabulary is reduced, so
that the head is a few percent of these few layers, as in a whole model. Two or three slots could not hide a layer
that takes several times as long as the others.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from functools import partial
from typing import Any

import numpy as np
from record import interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.results.trace import LaneName, Phase

LANES = ("loading", "arithmetic")
ORDERS = ("overlap_cpu_attention", "overlap_multi_batch", "normal")


def decode(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    """The seconds of all new tokens but the first."""
    model.generate(prompts, tokens, stop=())
    assert model.stats is not None
    return {"decode": model.stats.timing.decode}


def alone(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    """The seconds of the decode for the link alone and for all arithmetic alone."""
    lanes = model.lane_seconds(prompts, tokens)[Phase.DECODE]
    return {"loading": lanes[LaneName.TO_DEVICE], "arithmetic": lanes[LaneName.COMPUTE]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--links",
        nargs="+",
        default=["256MiB", "512MiB", "1GiB"],
        help="bandwidths of the emulated link, in bytes/s",
    )
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=1024, help="hidden size, a multiple of 64 (default: 1024)")
    add("--vocab", type=int, default=4096)
    add("--batch", type=int, default=32, help="prompts in a batch (default: 32)")
    add("--batches", type=int, default=4)
    add("--prompt-len", type=int, default=32)
    add("--gen-len", type=int, default=6)
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    shape = {name: value for name, value in vars(args).items() if name != "links"}
    document: dict[str, Any] = {"policy": policy_of(args).to_dict(), "shape": shape, "figures": {}}
    for link in args.links:
        document["figures"][link] = compare(measure(link, args))
        path = save("cpu_attention", document)
    print(
        f"{'link':<10}{'loading':>10}{'arithmetic':>12}  {'order':<24}{'decode':>10}{'/ larger':>10}{'/ sum':>10}"
    )
    for link, found in document["figures"].items():
        loading, arithmetic = (found["alone"][lane]["median"] for lane in LANES)
        for order in ORDERS:
            taken = found[order]
            print(
                f"{link:<10}{loading:>9.2f}s{arithmetic:>11.2f}s  {order:<24}"
                f"{taken['decode']['median']:>9.2f}s{taken['over_larger']:>10.2f}{taken['over_sum']:>10.2f}"
            )
    print(path)


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """The figures, with the median ratio of each order to the lanes alone in the same repeat."""
    alone = list(zip(*(found["alone"][lane]["all"] for lane in LANES), strict=True))
    for order in ORDERS:
        taken = found[order]["decode"]["all"]
        for name, of in (("over_larger", max), ("over_sum", sum)):
            ratios = [seconds / of(lanes) for seconds, lanes in zip(taken, alone, strict=True)]
            found[order][name] = statistics.median(ratios)
    return found


def policy_of(args: argparse.Namespace) -> Policy:
    return Policy(
        gpu_batch_size=args.batch,
        num_gpu_batches=args.batches,
        weights={"cpu": 100},
        cache={"cpu": 100},
        sep_layer=False,
    )


def measure(link: str, args: argparse.Namespace) -> dict[str, Any]:
    """All orders with one link and the lanes alone, interleaved."""
    config = OPTConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        word_embed_proj_dim=args.hidden,
    )
    policy = policy_of(args)
    prompts = np.random.default_rng(0).integers(4, args.vocab, size=(policy.block_size, args.prompt_len))
    with contextlib.ExitStack() as stack:
        cases = {}
        for order in ORDERS:
            model = stack.enter_context(
                OptLM(
                    config,
                    policy,
                    device=f"emulated:link={link}",
                    dtype="bfloat16",
                    weights="dummy",
                    order=order,
                    progress=False,
                )
            )
            model.generate(prompts[:1, :4], 2, stop=())
            cases[order] = partial(decode, model, prompts, args.gen_len)
            if order == ORDERS[0]:
                cases["alone"] = partial(alone, model, prompts, args.gen_len)
        return interleaved(cases, args.repeats)


if __name__ == "__main__":
    main()
