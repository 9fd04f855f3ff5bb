"""The embedded model answers its records under any policy as it does under transformers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen.demo import MODEL_DIR, accuracy, records
from flexgen.engine.model import OptLM
from flexgen.policy import Policy
from flexgen.quant import CODECS

COUNT, SEED, NEW_TOKENS = 40, 20_260, 20
THIRDS = {"gpu": 34, "cpu": 33, "disk": 33}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def jobs(tokenizer: Any) -> tuple[list[Any], list[list[int]], int]:
    """Fresh records, their ids, and the id that ends an answer's line."""
    asked = records(COUNT, SEED)
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return asked, [tokenizer(record.prompt)["input_ids"] for record in asked], newline


@pytest.fixture(scope="module")
def reference(tokenizer: Any, jobs: Any) -> list[str]:
    """What transformers answers, one record at a time."""
    _, prompts, newline = jobs
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=newline,
                pad_token_id=newline,
            )
        answers.append(tokenizer.decode(out[0, len(prompt) :]))
    return answers


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_answers_are_those_of_transformers(
    device: str, tokenizer: Any, jobs: Any, reference: list[str]
) -> None:
    asked, prompts, newline = jobs
    policy = Policy(gpu_batch_size=8, num_gpu_batches=3, weights=THIRDS, cache=THIRDS, activations=THIRDS)
    with OptLM("demo", policy, device=device, dtype="float32", progress=False) as lm:
        out = lm.generate(prompts, NEW_TOKENS, stop=newline)
        assert all(lm.placement.nbytes.values())
    width = max(map(len, prompts))
    answers = [tokenizer.decode(row[width:]).split("\n")[0] for row in out]
    assert answers == [text.split("\n")[0] for text in reference]
    assert accuracy(asked, answers) == accuracy(asked, reference)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_an_encoded_cache_costs_less_than_one_answer_in_a_hundred(codec: str, tokenizer: Any) -> None:
    assert right(codec, tokenizer) > right("none", tokenizer) - 0.01


@functools.cache
def right(codec: str, tokenizer: Any) -> float:
    """The share of 200 answers that are right with a cache in this codec."""
    asked = records(200, SEED + 1)
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    prompts = [tokenizer(record.prompt)["input_ids"] for record in asked]
    cache = {tier: {"percent": percent, "codec": codec} for tier, percent in THIRDS.items()}
    policy = Policy(gpu_batch_size=50, num_gpu_batches=2, cache=cache)
    with OptLM("demo", policy, device="emulated", dtype="float32", progress=False) as lm:
        out = lm.generate(prompts, NEW_TOKENS, stop=newline)
    answers = [tokenizer.decode(row[max(map(len, prompts)) :]).split("\n")[0] for row in out]
    return accuracy(asked, answers)["all"]


def test_answers_are_right(jobs: Any, reference: list[str]) -> None:
    assert accuracy(jobs[0], reference)["all"] >= 0.85
