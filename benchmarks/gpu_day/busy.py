"""OPT-6.7B on the GPU with torch's profiler: the share of a decode in which a kernel runs, and kernels per token."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.tuning.trial import warm_up
from gpu_day import arguments, write


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of the spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def main() -> int:
    args = arguments(__doc__)
    model, rows, prompt, tokens = ("opt-6.7b", 6, 512, 32)
    if args.toy:
        rows, prompt, tokens = 2, 8, 4
        model = OPTConfig(
            vocab_size=64, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2,
            num_attention_heads=4, ffn_dim=64,
        )  # fmt: skip
    with OptLM(
        model, Policy(gpu_batch_size=rows), device="cuda", weights="dummy", dtype="float16", progress=False
    ) as opened:
        ids = np.random.default_rng(0).integers(4, opened.spec.vocab_size, size=(rows, prompt))
        warm_up(opened, list(ids), tokens)
        found = {}
        # The decode is the difference between two numbers of tokens.
        for name, count in (("prefill", 1), ("whole", tokens)):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
                began = time.perf_counter()
                opened.generate(ids, count, stop=())
                torch.cuda.synchronize()
                took = time.perf_counter() - began
            kernels = [event for event in seen.events() if event.device_type is DeviceType.CUDA]
            spans = ((event.time_range.start, event.time_range.end) for event in kernels)
            found[name] = {"seconds": took, "busy": covered(spans) / 1e6, "kernels": len(kernels)}
        decode = {key: found["whole"][key] - found["prefill"][key] for key in ("seconds", "busy", "kernels")}
    if found["whole"]["kernels"]:
        decode["busy_share"] = decode["busy"] / decode["seconds"]
        decode["kernels_per_token_and_layer"] = decode["kernels"] / (tokens - 1) / opened.spec.num_layers
    else:
        decode["busy_share"] = None
        decode["why"] = (
            "the profiler found no kernels: CUPTI is missing here, or you have no permission to use it"
        )
    write(args.json, {**found, "decode": decode})
    return 0


if __name__ == "__main__":
    sys.exit(main())
