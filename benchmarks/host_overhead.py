"""The overhead of the host for a cell (one layer of one batch), in addition to the layer's arithmetic, in us.

    python benchmarks/host_overhead.py

All data of a tiny model is in device memory, so nothing has to move. The time of a decode beyond `Layer.forward` is
the loop, the lanes, the cache and the ids. The forward calls of one token are recorded and repeated in a plain loop
on the same inputs, without the engine; attention there only reads keys and values of the same length. `beside_us` is
the time of the decode minus that loop. `beside_forward_us` is the time of the decode minus the time inside
`Layer.forward` during the decode, which includes the work of the cache. Limit: 150 us.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from record import interleaved, save
from torch import Tensor
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.kernels.attention import decode_attention
from flexgen.kernels.scoring import Scoring
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer
from flexgen.schedule.orders import ORDERS

LIMIT_US = 150.0
ALL_ON_GPU = {name: {"gpu": 100} for name in ("weights", "cache", "activations")}
DECODES, PLAIN_LOOPS = 3, 21


class Forward(NamedTuple):
    """A call of `Layer.forward` by the engine, and its seconds."""

    layer: Layer
    x: Tensor
    weights: Mapping[str, Tensor]
    positions: Tensor
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--repeats", type=int, default=5)
    add("--case", choices=sorted(ORDERS), action="append", help="run only this order (may be repeated)")
    add("--device", action="append", help="cpu, cuda, ... (default: cpu, and cuda if available)")
    add("--layers", type=int, default=12)
    add("--hidden", type=int, default=64)
    add("--heads", type=int, default=2)
    add("--batch", type=int, default=4)
    add("--batches", type=int, default=4, help="batches in a block, for orders with several")
    add("--prompt-len", type=int, default=16)
    add("--tokens", type=int, default=33)
    add("--out", help="write the results to this file")
    args = parser.parse_args()
    devices = args.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    cases = {
        f"{device}, {order}": partial(measure, device, order, args)
        for device in devices
        for order in args.case or sorted(ORDERS)
    }
    figures = interleaved(cases, args.repeats)
    for name, found in figures.items():
        found["within_limit"] = found["beside_us"]["median"] <= LIMIT_US
        figures_us = ", ".join(f"{key} {found[key]['median']:.1f}" for key in found if key.endswith("_us"))
        print(f"{name:<30}{figures_us}")
    shape = {key: value for key, value in vars(args).items() if isinstance(value, int) and key != "repeats"}
    print(
        save(
            "host_overhead",
            {"shape": shape, "limit_us": LIMIT_US, "figures": figures},
            Path(args.out) if args.out else None,
        )
    )


def measure(device: str, order: str, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds per cell of one decode: in total, for the same forward calls alone, and the difference."""
    batches = 1 if order == "overlap_single_batch" else args.batches
    policy = Policy(gpu_batch_size=args.batch, num_gpu_batches=batches, **ALL_ON_GPU)
    config = OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden, vocab_size=256,
        num_hidden_layers=args.layers, num_attention_heads=args.heads,
    )  # fmt: skip
    prompts = np.random.default_rng(0).integers(4, 256, size=(policy.block_size, args.prompt_len))
    # float16 has the fastest attention on CUDA; a CPU has no instructions for it.
    dtype = "float32" if device == "cpu" else "float16"
    with OptLM(
        config, policy, device=device, dtype=dtype, weights="dummy", order=order, progress=False
    ) as model:
        run = partial(model.generate, prompts, args.tokens, stop=())
        decodes = []
        for _ in range(1 + DECODES):
            run()
            assert model.stats is not None
            decodes.append(model.stats.timing.decode)
        decode = statistics.median(decodes[1:])
        per_token = len(model.layer_names) * batches
        with noted_forwards() as calls:
            run()
        noted = model.stats.timing.decode
        later = calls[per_token:]
        middle = len(later) // per_token // 2 * per_token
        plain = in_plain_loop(later[middle : middle + per_token], args.prompt_len + args.tokens // 2)
    cells = len(later)
    return {
        "cell_us": 1e6 * decode / cells,
        "forward_us": 1e6 * plain / per_token,
        "beside_us": 1e6 * (decode / cells - plain / per_token),
        "beside_forward_us": 1e6 * (noted - sum(call.seconds for call in later)) / cells,
        "cells": float(cells),
    }


@contextmanager
def noted_forwards() -> Iterator[list[Forward]]:
    """Record all calls of `forward` of all layers in the body, in order."""
    calls: list[Forward] = []
    originals = {kind: kind.forward for kind in kinds(Layer) if "forward" in vars(kind)}

    def noting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(layer: Layer, x: Tensor, weights: Mapping[str, Tensor], ctx: Any) -> Tensor:
            # Copy x before the clock starts, because its buffer is reused.
            mine, positions = x.clone(), ctx.positions.clone()
            began = time.perf_counter()
            y = original(layer, x, weights, ctx)
            calls.append(Forward(layer, mine, weights, positions, time.perf_counter() - began))
            return y

        return forward

    try:
        for kind, original in originals.items():
            kind.forward = noting(original)  # type: ignore[method-assign]
        yield calls
    finally:
        for kind, original in originals.items():
            kind.forward = original  # type: ignore[method-assign]


def kinds(base: type) -> Iterator[type]:
    """All classes of layers."""
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


class Alone:
    """A context for a layer without an engine, with uninitialised keys and values of a fixed length."""

    last_only = True

    def __init__(self, call: Forward, length: int) -> None:
        self.positions = call.positions
        self._pages, self._length = [], length
        if isinstance(call.layer, AttentionLayer):
            cache = call.layer.layer_spec.attention.cache
            shape = (2, len(call.x), cache.kv_heads, length, cache.head_dim)
            keys, values = torch.zeros(shape, dtype=call.x.dtype, device=call.x.device)
            self._pages = [(keys, values)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return decode_attention(q, self._pages, self._length, None, scoring)


@torch.inference_mode()
def in_plain_loop(calls: list[Forward], length: int) -> float:
    """The seconds of these forward calls one after another: the median of several loops."""
    contexts = [Alone(call, length) for call in calls]
    synchronize = torch.cuda.synchronize if calls[0].x.is_cuda else lambda: None
    seconds = []
    for _ in range(PLAIN_LOOPS):
        synchronize()
        began = time.perf_counter()
        for call, context in zip(calls, contexts, strict=True):
            call.layer.forward(call.x, call.weights, context)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
