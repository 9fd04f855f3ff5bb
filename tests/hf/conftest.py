"""Tiny random models with a tokenizer that has a chat template, saved as transformers saves them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import TINY
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flexgen.hf import FlexGenForCausalLM
from flexgen.policy import Policy

SPECIAL = ["<pad>", "</s>", "<s>", "<user>", "<bot>"]
LETTERS = " abcdefghijklmnopqrstuvwxyz.,?!"
VOCAB = len(SPECIAL) + len(LETTERS)
PAD, EOS = 0, 1
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<bot>' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)

_SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, max_position_embeddings=64, pad_token_id=PAD,
    eos_token_id=EOS, bos_token_id=2,
)  # fmt: skip
_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_SIZES, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32)
    ),
    "opt projected": lambda: OPTForCausalLM(
        OPTConfig(
            **_SIZES, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES, num_attention_heads=8, num_key_value_heads=2, intermediate_size=48)
    ),
}


def _of_family(name: str) -> PreTrainedModel:
    """The first tiny model of a family, with ids of this tokenizer and room for its texts."""
    ids = dict(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2)
    names = ("n_positions", "max_position_embeddings")
    lengths = dict.fromkeys([f for f in names if hasattr(CONFIG_MAPPING[name](), f)][:1], 64)
    windows = {field: 64 for field in ("sliding_window",) if TINY[name][0].get(field)}
    config = CONFIG_MAPPING[name](**copy.deepcopy(TINY[name][0]) | ids | lengths | windows)
    return AutoModelForCausalLM.from_config(config)


THIRDS = {"gpu": 34, "cpu": 33, "disk": 33}
POLICY = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=THIRDS, cache=THIRDS, activations=THIRDS)


@dataclass
class Saved:
    """A saved model; `reference` is transformers' own."""

    directory: Path
    reference: PreTrainedModel

    def open(self, policy: Policy = POLICY, **options: Any) -> FlexGenForCausalLM:
        return FlexGenForCausalLM.from_pretrained(
            self.directory, policy, **dict(device="emulated", dtype="float32") | options
        )


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each letter."""
    words = Tokenizer(WordLevel({word: n for n, word in enumerate([*SPECIAL, *LETTERS])}, unk_token="?"))
    words.pre_tokenizer = Split("", "isolated")
    words.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        additional_special_tokens=["<user>", "<bot>"],
        padding_side="left",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return letters_tokenizer()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`saved("llama", "bfloat16")`: a model of random weights, made once."""
    made: dict[tuple[str, str], Saved] = {}

    def get(name: str = "llama", dtype: str = "float32") -> Saved:
        if (name, dtype) not in made:
            torch.manual_seed(0)
            model = _MODELS[name]() if name in _MODELS else _of_family(name)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.normal_(std=0.3)
                    if "norm.weight" in key:
                        parameter.add_(1.0)
            model.tie_weights()
            directory = tmp_path_factory.mktemp("model") / f"{name}-{dtype}".replace(" ", "-")
            model.to(getattr(torch, dtype)).save_pretrained(directory)
            letters_tokenizer().save_pretrained(directory)
            reference = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
            made[name, dtype] = Saved(directory, reference.eval())
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def names() -> list[str]:
    return list(_MODELS)


@pytest.fixture(scope="module")
def model(saved: Any) -> Iterator[FlexGenForCausalLM]:
    """The llama, open."""
    with saved("llama").open() as opened:
        yield opened


@pytest.fixture(scope="session")
def reference(saved: Any) -> PreTrainedModel:
    """The llama in transformers."""
    return saved("llama").reference


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, without special ids."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    ids = torch.randint(len(SPECIAL), VOCAB, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}


@pytest.fixture(scope="session")
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """`inputs([3, 7])`: `input_ids` and `attention_mask` of left-padded prompts of these lengths."""
    return left_padded
