"""A resident OPT-1.3B with CUDA graphs and without: seconds of a decode step, by batch size and by length, padded or
not. Ids must be equal but for ties, since attention over a mask may round otherwise."""

from __future__ import annotations

import sys
import time
from unittest import mock

import numpy as np
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.runtime import graphs
from gpu_day import arguments, write

NEVER = 1 << 30


def step_seconds(model: OptLM, ids: list[list[int]], tokens: int) -> tuple[float, np.ndarray]:
    """Seconds of a later token, and the ids."""
    took = {}
    for count in (1, tokens, 1, tokens):  # what is made once is in the first two
        began = time.perf_counter()
        out = model.generate(ids, count, stop=())
        took[count] = time.perf_counter() - began
    return (took[tokens] - took[1]) / (tokens - 1), out


def main() -> int:
    args = arguments(__doc__)
    model, batches, lengths, tokens = "opt-1.3b", (1, 8, 64), (128, 1024, 1900), 48
    if args.toy:
        batches, lengths, tokens = (1, 2), (8,), 12
        model = OPTConfig(
            vocab_size=64, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2,
            num_attention_heads=4, ffn_dim=64,
        )  # fmt: skip
    figures = {}
    for rows in batches:
        policy = Policy(gpu_batch_size=rows)
        with OptLM(model, policy, device="cuda", weights="dummy", dtype="float16", progress=False) as opened:
            draw = np.random.default_rng(0)
            for length in lengths:
                for padding in (0, length // 2):
                    prompts = [
                        draw.integers(4, opened.spec.vocab_size, length - padding * (n % 2)).tolist()
                        for n in range(rows)
                    ]
                    with_graphs, ids = step_seconds(opened, prompts, tokens)
                    with mock.patch.object(graphs, "MIN_TOKENS", NEVER):
                        without, expected = step_seconds(opened, prompts, tokens)
                    figures[f"{rows} rows of {length}, {padding} padded"] = {
                        "with graphs": with_graphs,
                        "without": without,
                        "ids that differ": int((ids != expected).sum()),
                    }
                    write(args.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
