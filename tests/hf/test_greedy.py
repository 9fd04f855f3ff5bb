"""Greedy ids equal those of transformers for all families, in float32 and bfloat16, alone and in padded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from flexgen.engine.model import OptLM
from flexgen.hf import FlexGenForCausalLM
from flexgen.models.families import known_families
from flexgen.policy import Policy
from flexgen.schedule.orders import ORDERS

PAD = 0
CHATS = [
    [{"role": "user", "content": "hello, who are you?"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": "tell me a story!"},
    ],
]


def same_but_for_ties(ours: list[int], theirs: list[int], width: int, reference: Any) -> None:
    """Equal ids up to where transformers' own logits of both ids are as one to its dtype.

    What bfloat16 rounds depends on how sums are taken: transformers' own ids differ there between a prompt that is
    padded and the same prompt alone.
    """
    first = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if first is None:
        assert len(ours) == len(theirs) or reference.dtype is not torch.float32
        return
    assert first >= width
    ids = torch.tensor([[x for x in ours[:first] if x != PAD]])
    with torch.no_grad():
        logits = reference(ids).logits[0, -1].float()
    gap = float(logits[theirs[first]] - logits[ours[first]])
    assert abs(gap) <= 8 * torch.finfo(reference.dtype).eps * float(logits.abs().max()), "not a near tie"


def names_of(model: Any) -> str:
    return " ".join(name for name, _ in model.named_parameters())


def in_float32(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    assert scores.dtype is torch.float32  # for any dtype of the model, as in transformers
    return scores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*known_families(), "opt projected"])
def test_the_chat_template_recipe(name: str, dtype: str, saved: Any) -> None:
    made = saved(name, dtype)
    tokenizer = AutoTokenizer.from_pretrained(made.directory, padding_side="left")
    texts = tokenizer.apply_chat_template(CHATS, tokenize=False, add_generation_prompt=True)
    with made.open(dtype="auto") as model:
        assert model.dtype == getattr(torch, dtype)
        for batch in (texts[:1], texts):
            inputs = tokenizer(batch, padding="longest", return_tensors="pt")
            new = dict(max_new_tokens=10, do_sample=False, logits_processor=[in_float32])
            ours, theirs = model.generate(**inputs, **new), made.reference.generate(**inputs, **new)
            assert isinstance(ours, torch.Tensor) and ours.dtype == torch.int64
            if dtype == "float32":
                assert ours.tolist() == theirs.tolist()
            width = inputs["input_ids"].shape[1]
            for row, other in zip(ours, theirs, strict=True):
                # In a mixture of experts, one rounding can change a choice, and then the logits are others.
                if dtype == "float32" or "experts" not in names_of(made.reference):
                    same_but_for_ties(row.tolist(), other.tolist(), width, made.reference)
                assert tokenizer.decode(row, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("order", "device"), [("normal", "cpu"), *((order, "emulated") for order in sorted(ORDERS))]
)
def test_many_rows_in_every_order(order: str, device: str, saved: Any, inputs: Any) -> None:
    made = saved("llama")
    given = inputs([5, 1, 9, 3, 7, 2, 8, 4, 6])
    theirs = made.reference.generate(**given, max_new_tokens=12, do_sample=False)
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights={"cpu": 50, "disk": 50}, cache={"cpu": 100})
    lm = OptLM(made.directory, policy, device=device, dtype="float32", order=order)
    with FlexGenForCausalLM(lm, made.reference.config, made.reference.generation_config) as model:
        ours = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert ours.tolist() == theirs.tolist()
    # Rows that end early make the blocks regroup.
    assert len({int((row == 0).sum()) for row in ours}) > 2


def test_the_text_generation_pipeline(saved: Any, tokenizer: Any) -> None:
    made, texts = saved("opt"), ["hello", "a longer one?", "x"]
    options = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    with made.open() as model:
        ours = pipeline("text-generation", model=model, tokenizer=tokenizer)
        theirs = pipeline("text-generation", model=made.reference, tokenizer=tokenizer)
        assert ours(texts, **options) == theirs(texts, **options)
        assert ours(texts, batch_size=3, **options) == theirs(texts, batch_size=3, **options)
        for given in ("", CHATS[0], CHATS):
            assert ours(given, **options) == theirs(given, **options)
