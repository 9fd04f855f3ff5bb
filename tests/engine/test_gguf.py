"""Models in GGUF files: generation from all tiers, the tokenizer in the file, and transformers' interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import Tiny, round_matrices, tiny, write_gguf
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flexgen.engine.model import OptLM
from flexgen.engine.text import load_tokenizer
from flexgen.errors import ModelError
from flexgen.hf import FlexGenForCausalLM

TOKENS = 8
MODELS = {
    "llama": Tiny("llama"),
    "gemma3": Tiny("gemma3_text", 0, dict(layer_types=None, num_hidden_layers=7)),
}
BYTES = list(bytes_to_unicode().values())
MERGES = ["t h", "th e", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE} the"]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "<end>"],
    "tokenizer.ggml.token_type": [1] * (len(BYTES) + len(MERGES)) + [3],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": len(BYTES) + len(MERGES),
    "tokenizer.ggml.bos_token_id": None,
}


@pytest.fixture
def with_vocabulary(tmp_path: Path) -> Path:
    """A file with a vocabulary of bytes and three merges."""
    model = tiny(Tiny("qwen2"), vocab_size=len(VOCABULARY["tokenizer.ggml.tokens"]))
    return write_gguf(tmp_path / "model.gguf", "qwen2", model, changes=VOCABULARY)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_greedy_ids(architecture: str, kind: str, tmp_path: Path, prompts: Any, mixed: Any) -> None:
    """With weights on all tiers: plain ones are read in place, others are written to the offload directory."""
    sizes = dict(hidden_size=64, intermediate_size=96, query_pre_attn_scalar=12)
    model = tiny(MODELS[architecture], **sizes if architecture == "gemma3" else dict(hidden_size=64))
    if kind != "F32":
        round_matrices(model, kind)
    path = write_gguf(tmp_path / "model.gguf", architecture, model, kind=kind)
    ids = torch.tensor(prompts([6, 6, 6, 6]))
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )
    with OptLM(path, mixed(), device="emulated", dtype="float32", progress=False) as lm:
        ours = lm.generate(ids.tolist(), TOKENS, stop=())
        assert all(lm.placement.nbytes.values())
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_it_opens_with_the_interface_of_transformers(with_vocabulary: Path, mixed: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with OptLM(with_vocabulary, mixed(), device="cpu", progress=False) as lm:
        ours = lm.generate(ids.tolist(), TOKENS, stop=())
    with FlexGenForCausalLM.from_pretrained(with_vocabulary, policy=mixed(), device="cpu") as model:
        theirs = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        assert model.config.model_type == "qwen2"
        assert model.generation_config.eos_token_id == [VOCABULARY["tokenizer.ggml.eos_token_id"]]
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_tokenizer_in_the_file(with_vocabulary: Path, mixed: Any) -> None:
    with OptLM(with_vocabulary, mixed(), device="cpu", progress=False) as lm:
        assert lm.tokenizer("the the").input_ids == [len(BYTES) + 1, len(BYTES) + 2]
        assert lm.tokenizer.decode([len(BYTES) + 1, len(BYTES) + 2]) == "the the"
        (text,) = lm.generate_text(["the"], max_new_tokens=4)
        assert isinstance(text, str)


def test_files_of_a_tokenizer_are_preferred(with_vocabulary: Path) -> None:
    tokenizer = load_tokenizer(with_vocabulary, "mine")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(with_vocabulary.parent)
    assert len(load_tokenizer(with_vocabulary, "mine")) == len(tokenizer)


def test_a_tokenizer_that_cannot_be_converted(tmp_path: Path) -> None:
    """transformers converts those of some architectures only."""
    path = write_gguf(tmp_path / "model.gguf", "olmo2", tiny(Tiny("olmo2")))
    with pytest.raises(
        ModelError, match=r"cannot be read: .*\. Put the files of the model's tokenizer next to it"
    ):
        load_tokenizer(path, "mine")
