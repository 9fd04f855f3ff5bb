"""The benefit of guesses of the next tokens: time with and without them, over a slow emulated link.

    python benchmarks/guesses.py

`copying` has records of the demo model's tasks as prompts, one after another with their answers, and then a record
whose answer is in the prompt. The demo model continues with records of the same kind, so much of its text occurs
earlier. `new` has random ids as prompts of a model with random weights, which draws almost random ids, so almost
nothing occurs earlier. It has half as many new tokens. In both, all weights cross the link in each pass. Cases run in
turn, and ids are compared. One thread computes, so that another core is free for the link and the host: on two cores,
the threads of two computations hinder each other. With five repeats, it takes about three minutes on two cores.

With --predict, the result also has the predicted tokens/s of each case, from the mean length of the prompts and from
the mean number of new tokens in a pass of the run (`Workload.copied`). The machine is measured before and after the
runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import compared, interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.demo.tasks import records
from flexgen.models import ModelSpec
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe.measured import measured
from flexgen.workload import Workload

SHAPE = dict(hidden_size=192, num_attention_heads=6, ffn_dim=768, word_embed_proj_dim=192, vocab_size=1536)
"""That of the demo model."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--guess", type=int, default=4)
    add("--prompts", type=int, default=32)
    add("--gen-len", type=int, default=32)
    add("--link", default="64MiB", help="bytes per second of the emulated link")
    add("--repeats", type=int, default=5)
    add("--predict", action="store_true", help="also predict each case")
    add("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)

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
    jobs: dict[str, tuple[ModelSpec, Policy, Workload]] = {}

    def run(kind: str, guess: int) -> dict[str, float]:
        model = dict(model="demo") if kind == "copying" else dict(model=config, weights="dummy")
        with OptLM(policy=policy.replace(guess=guess), **model, **opening) as lm:
            prompts = [lm.tokenizer.encode(text) for text in texts] if kind == "copying" else random_ids
            sampling = {} if kind == "copying" else dict(do_sample=True, seed=0)
            lm.generate(prompts[:2], 2, stop=())  # libraries load their kernels
            tokens = args.gen_len if kind == "copying" else args.gen_len // 2
            ids[kind, guess], report = lm.generate(prompts, tokens, stop=(), stats=True, **sampling)
            length = round(np.mean([len(prompt) for prompt in prompts]))
            job = Workload(length, tokens, args.prompts, copied=report.copied)
            jobs[f"{kind}, {guess} guesses"] = lm.spec, lm.policy, job
        return {
            "total_s": report.total_s,
            "decode_s": report.decode_s,
            "tokens_s": report.throughput_tokens_s,
            "tokens_in_pass": report.copied,
        }

    def case(kind: str, guess: int) -> Callable[[], dict[str, float]]:
        return lambda: run(kind, guess)

    machines: list[Hardware] = []
    if args.predict:
        machines.append(measured(opening["device"], again=True))
    kinds, guesses = ("copying", "new"), (0, args.guess)
    cases = {f"{kind}, {guess} guesses": case(kind, guess) for kind in kinds for guess in guesses}
    found = interleaved(cases, args.repeats)
    ratios = {}
    for kind in kinds:
        plain, guessed = (found[f"{kind}, {guess} guesses"]["tokens_s"]["median"] for guess in guesses)
        equal = float((ids[kind, 0] == ids[kind, args.guess]).all(axis=1).mean())
        ratios[kind] = {"ratio": guessed / plain, "equal_rows": equal}
        print(f"{kind}: {guessed:.1f} against {plain:.1f} tokens/s, {guessed / plain:.2f} times")
    predictions = {}
    if args.predict:
        machines.append(measured(opening["device"], again=True))
        for name, (spec, own, job) in jobs.items():
            foretold = [predict(spec, own, machine, job, dtype="float32").report for machine in machines]
            speeds = [report.throughput_tokens_s for report in foretold]
            predictions[name] = compared(name, speeds, found[name]["tokens_s"]["median"])
    if not args.no_save:
        figures = {"arguments": vars(args), "cases": found, "ratios": ratios, "predicted": predictions}
        save("guesses", figures)


if __name__ == "__main__":
    main()
