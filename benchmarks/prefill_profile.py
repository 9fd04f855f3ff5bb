"""The time of a prefill in bfloat16 by part, with the weights in memory, and that of its products in the library.

    python benchmarks/prefill_profile.py --work-dir DIR [--batch 1 8 32]

DIR has the Llama shape of cpu_peers.py. A repeat measures, one after the other: a whole prefill; its matrix products
alone, with flexgen's kernels, with torch's product of the plain matrix, and with oneDNN's of a matrix that was
converted to its layout before; and its attention alone. Without products in bfloat16, the library multiplies in
float32, which is its fastest product there; the time to widen the matrices is not measured. `rest` is what remains of
flexgen's prefill: norms, rotations, activation functions, residuals, the head, the cache and Python. `library_share`
is the time of the library's fastest products as a share of that of flexgen's. Figures are medians of the repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cpu_peers import PROMPT_LEN, instruction_sets
from record import interleaved, save
from shapes import SHAPES
from torch import Tensor

from flexgen import OptLM, Policy
from flexgen.kernels.linear import linear
from flexgen.kernels.scoring import Scoring
from flexgen.models.ops import causal_attention

MODEL = "llama-1b-32k"
CONFIG = SHAPES[MODEL]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = {str(batch): profile(batch, args) for batch in args.batch}
    for batch, part in found.items():
        print(f"batch {batch}: " + ", ".join(f"{name} {value:.3g}" for name, value in part.items()))
    document = {"model": MODEL, "prompt_len": PROMPT_LEN, "batches": found}
    print(save("prefill_profile", {"instruction_sets": instruction_sets(), **document}, args.out))


def profile(batch: int, args: argparse.Namespace) -> dict[str, float]:
    """The median seconds of a prefill and of its parts."""
    ids = np.random.default_rng(0).integers(4, 30_000, size=(batch, PROMPT_LEN))
    everything = {"cpu": 100}
    policy = Policy(gpu_batch_size=batch, weights=everything, cache=everything, activations=everything)
    with OptLM(args.work_dir / MODEL, policy, device="cpu", dtype="bfloat16", progress=False) as model:

        def prefill() -> None:
            model.generate(ids, 1, stop=())

        calls = {"prefill_s": prefill, **products(batch * PROMPT_LEN), "attention_s": attention(batch)}
        for call in calls.values():
            call()
        timed = interleaved({name: seconds(call) for name, call in calls.items()}, args.repeats)
    medians = {name: statistics.median(figures["s"]["all"]) for name, figures in timed.items()}
    medians["rest_s"] = medians["prefill_s"] - medians["products_s"] - medians["attention_s"]
    fastest = min(value for name, value in medians.items() if name.startswith("library"))
    return medians | {"library_share": fastest / medians["products_s"]}


def seconds(call: Callable[[], object]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        began = time.perf_counter()
        call()
        return {"s": time.perf_counter() - began}

    return run


def products(rows: int) -> dict[str, Callable[[], None]]:
    """The products of all layers. Each layer has the same matrices: for many rows, reading them takes no time."""
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    own = CONFIG.num_key_value_heads * CONFIG.head_dim
    shapes = (
        [(hidden, hidden)] * 2 + [(own, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    )  # out, in
    plain = [torch.randn(shape).bfloat16() / 32 for shape in shapes]
    inputs = {size: torch.randn(rows, size).bfloat16() for size in (hidden, inner)}

    def run(multiply: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor]) -> Callable[[], None]:
        own_inputs = {size: x.to(weights[0].dtype) for size, x in inputs.items()}

        def layers() -> None:
            for _ in range(CONFIG.num_hidden_layers):
                for weight, (_, size) in zip(weights, shapes, strict=True):
                    multiply(own_inputs[size], weight)

        return layers

    found = {"products_s": run(linear, plain)}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return found | {"library_float32_s": run(F.linear, [weight.float() for weight in plain])}
    laid_out = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in plain]
    return found | {"library_plain_s": run(F.linear, plain), "library_laid_out_s": run(linear, laid_out)}


def attention(batch: int) -> Callable[[], None]:
    heads = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.num_key_value_heads
    q, k, v = (
        torch.randn(batch, PROMPT_LEN, count, CONFIG.head_dim).bfloat16().transpose(1, 2) for count in heads
    )
    scoring = Scoring(CONFIG.head_dim**-0.5)

    def layers() -> None:
        for _ in range(CONFIG.num_hidden_layers):
            causal_attention(q, k, v, None, scoring)

    return layers


if __name__ == "__main__":
    main()
