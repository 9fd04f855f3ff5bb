"""Compare flexgen with transformers in memory: same weights, batch and dtype, interleaved in one process.

    python benchmarks/transformers_in_ram.py

The models have eight layers of the OPT-1.3B shape and of a Llama-1B shape, with random weights in bfloat16, and
greedy decoding. The prefill is a call for one new token; the decode is the additional time of the other tokens.
Ratios are the time of transformers over that of flexgen.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import interleaved, save
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from flexgen import OptLM, Policy

LAYERS = 8
CONFIGS = {
    "opt-1.3b": OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=LAYERS, num_attention_heads=32, word_embed_proj_dim=2048
    ),
    "llama-1b": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=32_000,
    ),
}  # fmt: skip
PROMPT_LEN, NEW_TOKENS = 128, 32


def timed(generate: Callable[[int], Any]) -> dict[str, float]:
    """The seconds of the prefill, of the later tokens, and of both, from two calls."""
    began = time.perf_counter()
    generate(1)
    first = time.perf_counter()
    generate(NEW_TOKENS)
    total = time.perf_counter() - first
    prefill = first - began
    return {"prefill_s": prefill, "decode_s": total - prefill, "total_s": total}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--out", type=Path, help="write the results to this file")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            model.generation_config.eos_token_id = None
            model.save_pretrained(Path(folder))
            for batch in args.batches:
                ids = np.random.default_rng(0).integers(4, 30_000, size=(batch, PROMPT_LEN))
                figures[f"{name}, batch {batch}"] = compare(model, folder, ids, args.repeats)
    print(f"{'case':<24}{'prefill':>10}{'decode':>10}{'total':>10}")
    for case, found in figures.items():
        print(
            f"{case:<24}"
            + "".join(f"{found['ratio'][part]:>10.2f}" for part in ("prefill_s", "decode_s", "total_s"))
        )
    document = {"layers": LAYERS, "prompt_len": PROMPT_LEN, "figures": figures}
    print(save("transformers_in_ram", document, args.out))


def compare(model: Any, folder: str, ids: np.ndarray, repeats: int) -> dict[str, Any]:
    """Run both sides on the same prompts, and add the medians of the ratios of all repeats."""
    tensor = torch.from_numpy(ids)
    mask = torch.ones_like(tensor)

    @torch.inference_mode()
    def theirs(tokens: int) -> None:
        model.generate(tensor, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=1)

    policy = Policy(
        gpu_batch_size=len(ids), weights={"cpu": 100}, cache={"cpu": 100}, activations={"cpu": 100}
    )
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(OptLM(folder, policy, device="cpu", dtype="bfloat16", progress=False))
        for warm_up in (theirs, partial(ours.generate, ids, stop=())):
            warm_up(2)
        found = interleaved(
            {
                "transformers": partial(timed, theirs),
                "flexgen": partial(timed, lambda tokens: ours.generate(ids, tokens, stop=())),
            },
            repeats,
        )
    sides = found["transformers"], found["flexgen"]
    ratios = {
        part: statistics.median(a / b for a, b in zip(*(side[part]["all"] for side in sides), strict=True))
        for part in ("prefill_s", "decode_s", "total_s")
    }
    return {**found, "ratio": ratios}


if __name__ == "__main__":
    main()
