"""The first difference to the greedy ids of transformers in bfloat16, and which side is closer to float64.

    python benchmarks/greedy_ids.py

Runs many tiny random models of each family with `flexgen.hf` and with transformers, from the same files: single
prompts and left-padded batches of two, with 10 new tokens. In float32 all ids must be equal. In bfloat16, a sum that
is rounded at another place may change the order of nearly equal logits. For each row with different ids, it reports
the gap between the two ids in float64, in units of the last place of the largest logit, which is the error of one
rounding. It also reports how often transformers' own ids differ between a prompt in a batch and the same prompt
alone, and the distance of each side's logits from float64 over the common tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from record import save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel
from transformers.utils import logging

from flexgen import Policy
from flexgen.hf import FlexGenForCausalLM

NEW = 10
PROMPTS = (8, 14)
SIZES = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=2,
    eos_token_id=1,
)  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTConfig(**SIZES, num_attention_heads=4, ffn_dim=160, word_embed_proj_dim=64),
    "opt, projected, norm after": lambda: OPTConfig(
        **SIZES, num_attention_heads=4, ffn_dim=160, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "llama": lambda: LlamaConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=2, intermediate_size=160
    ),
}
Answers = tuple[Tensor, Tensor]
"""Ids (rows, NEW) and logits (rows, NEW, vocab), or the same for one row."""


def made(name: str, seed: int, directory: Path) -> None:
    """Random weights in bfloat16, with a variance large enough that the ids vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm.weight" in key:
                parameter.add_(1.0)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(directory)


def answers(model: Any, ids: Tensor, mask: Tensor) -> Answers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack([step.float() for step in out.logits], dim=1)


def row_of(all_: Answers, n: int) -> Answers:
    return all_[0][n], all_[1][n]


def parted(one: Tensor, other: Tensor) -> int:
    """The first index at which two rows of ids differ; NEW if they are equal."""
    differ = (one != other).nonzero()
    return int(differ[0]) if len(differ) else NEW


class Tally:
    """The results of a family in one dtype."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys(("alone", "batch of 2"), 0)
        self.parted = dict.fromkeys(self.rows, 0)
        self.theirs_alone_or_in_batch = 0
        self.gaps: list[float] = []
        self.errors: dict[str, list[float]] = {"flexgen": [], "transformers": []}

    def add(self, kind: str, prompt: Tensor, ours: Answers, theirs: Answers, exact: PreTrainedModel) -> None:
        """Add a row: `prompt` (tokens without padding), and ids (NEW,) and logits (NEW, vocab) of both sides."""
        place = parted(ours[0], theirs[0])
        self.rows[kind] += 1
        self.parted[kind] += place < NEW
        shared = min(place + 1, NEW)
        with torch.no_grad():
            known = exact(torch.cat([prompt, ours[0][: shared - 1]])[None]).logits[0, len(prompt) - 1 :]
        for side, (_, logits) in (("flexgen", ours), ("transformers", theirs)):
            error = (logits[:shared].double() - known).pow(2).mean().sqrt() / known.pow(2).mean().sqrt()
            self.errors[side].append(float(error))
        if place < NEW:
            last = known[place]
            gap = abs(float(last[ours[0][place]] - last[theirs[0][place]]))
            self.gaps.append(gap / float(torch.finfo(torch.bfloat16).eps * last.abs().max()))

    def figures(self) -> Mapping[str, Any]:
        error = {side: statistics.median(errors) for side, errors in self.errors.items()}
        return {
            "rows": self.rows,
            "rows_that_part": self.parted,
            "transformers_alone_against_batch_part": self.theirs_alone_or_in_batch,
            "gap_in_float64_in_last_places": sorted(round(gap, 3) for gap in self.gaps),
            "relative_error_of_logits_to_float64": error,
        }


def trial(tally: Tally, seed: int, model: Any, reference: PreTrainedModel, exact: PreTrainedModel) -> None:
    drawn = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, SIZES["vocab_size"], (length,), generator=drawn) for length in PROMPTS]
    alone = []
    for row in rows:
        inputs = row[None], torch.ones_like(row)[None]
        ours, theirs = answers(model, *inputs), answers(reference, *inputs)
        alone.append(theirs[0][0])
        tally.add("alone", row, row_of(ours, 0), row_of(theirs, 0), exact)
    ids, mask = (torch.zeros(len(rows), max(PROMPTS), dtype=torch.int64) for _ in range(2))
    for n, row in enumerate(rows):
        ids[n, -len(row) :], mask[n, -len(row) :] = row, 1
    ours, theirs = answers(model, ids, mask), answers(reference, ids, mask)
    for n, row in enumerate(rows):
        tally.add("batch of 2", row, row_of(ours, n), row_of(theirs, n), exact)
        tally.theirs_alone_or_in_batch += parted(theirs[0][n], alone[n]) < NEW


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=20, help="models of each family and dtype")
    parser.add_argument("--trials", type=int, default=4, help="pairs of prompts for each model")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures: dict[str, dict[str, Any]] = {}
    for dtype in ("float32", "bfloat16"):
        for name in CONFIGS:
            tally = Tally()
            for seed in range(args.models):
                with tempfile.TemporaryDirectory() as directory:
                    made(name, seed, Path(directory))
                    reference, exact = (
                        AutoModelForCausalLM.from_pretrained(directory, dtype=kind).eval()
                        for kind in (getattr(torch, dtype), torch.float64)
                    )
                    policy = Policy(gpu_batch_size=2)
                    with FlexGenForCausalLM.from_pretrained(directory, policy, "cpu", dtype) as model:
                        for n in range(args.trials):
                            trial(tally, seed * args.trials + n, model, reference, exact)
            figures[f"{name}, {dtype}"] = dict(tally.figures())
            print(name, dtype, figures[f"{name}, {dtype}"], flush=True)
    parting = [gap for case in figures.values() for gap in case["gap_in_float64_in_last_places"]]
    save("greedy_ids", {"new_tokens": NEW, "largest_gap": max(parting, default=0.0), "figures": figures})


if __name__ == "__main__":
    main()
