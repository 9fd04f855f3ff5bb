"""The effect of codecs on accuracy: correct answers and perplexity of the embedded model with each codec.

    python benchmarks/accuracy.py

Runs held-out records with greedy decoding in float32 on the CPU. Reports the share of exact answers by task, the
perplexity of the correct answers given their prompts, and the perplexity of the whole texts. A codec that the policy
does not support is reported as refused. Perplexity is measured with prefills, where attention uses keys and values
before they are encoded. So a codec of the cache affects only the answers. The result does not depend on the speed of
the machine; one run is enough.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import save
from transformers import AutoTokenizer

from flexgen import OptLM, Policy, demo
from flexgen.engine.scoring import perplexity, score
from flexgen.errors import PolicyError
from flexgen.quant import CODECS

CASES = {
    **{f"weights {codec}": {"weights": codec} for codec in ("none", *CODECS)},
    **{f"cache {codec}": {"cache": codec} for codec in CODECS},
    **{f"weights and cache {codec}": {"weights": codec, "cache": codec} for codec in CODECS},
}
NEW_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument(
        "--seed", type=int, default=20_260, help="seed of the records (default: the seed of the tests)"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="write the results to this file")
    args = parser.parse_args()
    records = demo.records(args.records, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    figures: dict[str, Any] = {}
    for name in args.case or CASES:
        figures[name] = measure(CASES[name], records, tokenizer, args)
        print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    print(f"{'case':<24}{'correct':>9}{'perplexity of answers':>24}{'of texts':>12}")
    for name, found in figures.items():
        if "refused" in found:
            print(f"{name:<24}refused: {found['refused']}")
        else:
            columns = f"{found['answers_perplexity']:>24.5f}{found['texts_perplexity']:>12.4f}"
            print(f"{name:<24}{found['correct']['all']:>9.2%}{columns}")
    settings = {key: getattr(args, key) for key in ("records", "seed", "dtype")} | {"new_tokens": NEW_TOKENS}
    print(save("accuracy", {**settings, "figures": figures}, Path(args.out) if args.out else None))


def measure(
    codecs: dict[str, str], records: Sequence[demo.Record], tokenizer: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """The shares of correct answers by task and both perplexities, or the reason why the policy is invalid."""
    splits = {
        what: {"cpu": {"percent": 100, "codec": codecs.get(what, "none")}} for what in ("weights", "cache")
    }
    try:
        policy = Policy(gpu_batch_size=args.batch, **splits, activations={"cpu": 100})
    except PolicyError as error:
        return {"refused": str(error)}
    prompts = [tokenizer(record.prompt).input_ids for record in records]
    texts = [tokenizer(record.text).input_ids for record in records]
    (newline,) = tokenizer("\n", add_special_tokens=False).input_ids
    with OptLM("demo", policy, device="cpu", dtype=args.dtype, progress=False) as model:
        ids = model.generate([np.array(prompt) for prompt in prompts], NEW_TOKENS, stop=newline)
        scores = score(model.forward, texts)
    width = max(map(len, prompts))
    answers = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in ids]
    # The ids of a text begin with those of its prompt; the first id of a text has no score.
    of_answers = [found[len(prompt) - 1 :] for found, prompt in zip(scores, prompts, strict=True)]
    return {
        "correct": demo.accuracy(records, answers),
        "answers_perplexity": perplexity(of_answers),
        "texts_perplexity": perplexity(scores),
    }


if __name__ == "__main__":
    main()
