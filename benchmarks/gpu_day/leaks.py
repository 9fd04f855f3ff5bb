"""Open, run and close models one after another, and measure the device memory that remains in use after each."""

from __future__ import annotations

import gc
import sys

import torch
from transformers import OPTConfig

from flexgen import OptLM, Policy
from gpu_day import arguments, write

ALLOWED = 4 << 20
"""The most bytes of growth after the third model. A leaked cuBLAS workspace has 8 or 32 MiB."""


def main() -> int:
    args = arguments(__doc__)
    hidden, models = (64, 5) if args.toy else (1024, 40)
    config = OPTConfig(
        vocab_size=512, hidden_size=hidden, word_embed_proj_dim=hidden, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=4 * hidden,
    )  # fmt: skip
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights={"gpu": 50, "cpu": 50})
    reserved, used = [], []
    for _ in range(models):
        with OptLM(config, policy, device="cuda", weights="dummy", dtype="float16", progress=False) as model:
            model.generate([[5, 6, 7]] * 4, 4, stop=())
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        reserved.append(torch.cuda.memory_reserved())
        used.append(total - free)
    grown = max(all_[-1] - all_[2] for all_ in (reserved, used))
    write(args.json, {"reserved": reserved, "used": used, "grown": grown})
    return int(grown > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
