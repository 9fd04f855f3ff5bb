"""The benefit of guesses of the next tokens: time with and without them, over a slow emulated link.

    python benchmarks/guesses.py

`copying` has records of the demo model's tasks as prompts, one after another with their answers, and then a record
whose answer is in the prompt. The demo model continues with records of the same kind, so much of its text occurs
earlier. `new` has random ids as prompts of a model with random weights, which draws almost random ids, so almost
nothing occurs earlier. In both, all weights cross the link in each pass. Cases run in turn, and ids are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from record import interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.demo.tasks import records

SHAPE = dict(hidden_size=192, num_attention_heads=6, ffn_dim=768, word_embed_proj_dim=192, vocab_size=1536)
"""That of the demo model."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--guess", type=int, default=4)
    add("--prompts", type=int, default=32)
    add("--gen-len", type=int, default=48)
    add("--link", default="64MiB", help="bytes per second of the emulated link")
    add("--repeats", type=int, default=5)
    args = parser.parse_args()

    policy = Policy(
        gpu_batch_size=2,
        num_gpu_batches=8,
        weights={"cpu": 100},
        cache={"cpu": 100},
        activations={"gpu": 100},
    )
    opening: dict[str, Any] = dict(dtype="float32", device=f"emulated:link={args.link}", progress=False)
    rng = np.random.default_rng(0)
    few = [records(8, seed, ("lookup", "field")) for seed in range(args.prompts)]
    texts = ["".join(record.text for record in some[:-1]) + some[-1].prompt for some in few]
    random_ids = rng.integers(5, SHAPE["vocab_size"], size=(args.prompts, 64))
    config = OPTConfig(num_hidden_layers=4, **SHAPE)
    ids: dict[tuple[str, int], np.ndarray] = {}

    def run(kind: str, guess: int) -> dict[str, float]:
        model = dict(model="demo") if kind == "copying" else dict(model=config, weights="dummy")
        with OptLM(policy=policy.replace(guess=guess), **model, **opening) as lm:
            prompts = [lm.tokenizer.encode(text) for text in texts] if kind == "copying" else random_ids
            sampling = {} if kind == "copying" else dict(do_sample=True, seed=0)
            lm.generate(prompts[:2], 2, stop=())  # libraries load their kernels
            ids[kind, guess], report = lm.generate(prompts, args.gen_len, stop=(), stats=True, **sampling)
        return {
            "total_s": report.total_s,
            "decode_s": report.decode_s,
            "tokens_s": report.throughput_tokens_s,
            "tokens_in_pass": report.copied,
        }

    def case(kind: str, guess: int) -> Callable[[], dict[str, float]]:
        return lambda: run(kind, guess)

    kinds, guesses = ("copying", "new"), (0, args.guess)
    cases = {f"{kind}, {guess} guesses": case(kind, guess) for kind in kinds for guess in guesses}
    found = interleaved(cases, args.repeats)
    ratios = {}
    for kind in kinds:
        plain, guessed = (found[f"{kind}, {guess} guesses"]["tokens_s"]["median"] for guess in guesses)
        equal = float((ids[kind, 0] == ids[kind, args.guess]).all(axis=1).mean())
        ratios[kind] = {"ratio": guessed / plain, "equal_rows": equal}
        print(f"{kind}: {guessed:.1f} against {plain:.1f} tokens/s, {guessed / plain:.2f} times")
    save("guesses", {"arguments": vars(args), "cases": found, "ratios": ratios})


if __name__ == "__main__":
    main()
