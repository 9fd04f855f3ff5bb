"""Tiny random models, saved once per session, and what transformers generates with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from piece_sizes import piece_sizes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from flexgen import OptLM
from flexgen.models.embed import Head
from flexgen.policy import Policy

VOCAB, POSITIONS, PAD = 64, 48, 1

_OPT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=POSITIONS, word_embed_proj_dim=32, pad_token_id=PAD,
)  # fmt: skip
_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    intermediate_size=48, max_position_embeddings=POSITIONS, pad_token_id=PAD,
)  # fmt: skip
_ROPE = dict(
    rope_type="llama3", rope_theta=10_000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip

CONFIGS: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(**_OPT),
    "opt post-norm projected": OPTConfig(
        **_OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16, num_attention_heads=2)
    ),
    "opt without biases": OPTConfig(
        **_OPT, enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"
    ),
    "opt untied": OPTConfig(**_OPT, tie_word_embeddings=False),
    "llama gqa 1 with biases, tied": LlamaConfig(
        **_LLAMA | dict(num_key_value_heads=8), attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama gqa 2": LlamaConfig(**_LLAMA),
    "llama gqa 8, scaled rope": LlamaConfig(**_LLAMA | dict(num_key_value_heads=1), rope_parameters=_ROPE),
    "gemma2, every other layer with a window": Gemma2Config(
        **_LLAMA | dict(head_dim=8), sliding_window=5, attn_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "mistral with a window": MistralConfig(**_LLAMA, sliding_window=6),
}


@dataclass
class Tiny:
    """A saved model and transformers' answers with it; what was asked before is answered from memory."""

    directory: Path
    model: PreTrainedModel
    _answers: dict[Any, np.ndarray] = field(default_factory=dict)

    def greedy(
        self, prompts: Sequence[Sequence[int]], tokens: int, stop: Sequence[int] = (), pad: int = PAD
    ) -> np.ndarray:
        """What `generate` must return: transformers' greedy ids of the left-padded prompts."""
        asked = tuple(map(tuple, prompts)), tokens, tuple(stop), pad
        if asked not in self._answers:
            self._answers[asked] = self._greedy(prompts, tokens, stop, pad)
        return self._answers[asked].copy()

    def _greedy(
        self, prompts: Sequence[Sequence[int]], tokens: int, stop: Sequence[int], pad: int
    ) -> np.ndarray:
        ids, mask = left_padded(prompts, pad)
        ends: dict[str, Any] = dict(eos_token_id=list(stop)) if stop else {}
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad, **ends
            )
        result = np.full((len(prompts), ids.shape[1] + tokens), pad)
        result[:, : out.shape[1]] = out.numpy()
        return result

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """transformers' logits of every position, for padding at either end."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            return self.model(ids, attention_mask=mask, position_ids=positions).logits


def left_padded(prompts: Sequence[Sequence[int]], pad: int = PAD) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of ragged prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def make_tiny(config: PreTrainedConfig, directory: Path) -> Tiny:
    torch.manual_seed(0)
    # Only "eager" has caps of scores. OPT and Llama keep transformers' default.
    how = "eager" if config.model_type == "gemma2" else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=how)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm.weight" in name:  # around 1, or the biases alone would choose the token
                parameter.add_(1.0)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # a row stops where a test says so
    model.eval().save_pretrained(directory)
    return Tiny(directory, model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """`tiny("opt")`: one of the models, made once."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = make_tiny(CONFIGS[name], tmp_path_factory.mktemp("model") / name.replace(" ", "-"))
        return made[name]

    return get


@pytest.fixture(scope="session")
def model_names() -> list[str]:
    return list(CONFIGS)


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """`prompts([3, 7])`: random prompts of these lengths, without the pad id."""

    def make(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [rng.integers(PAD + 1, VOCAB, length).tolist() for length in lengths]

    return make


@pytest.fixture(scope="session")
def mixed() -> Callable[..., Policy]:
    """`mixed(overlap=False)`: a policy that puts part of each class on each tier."""

    def make(**changes: Any) -> Policy:
        thirds = {"gpu": 34, "cpu": 33, "disk": 33}
        fields: dict[str, Any] = dict(
            gpu_batch_size=3, num_gpu_batches=2, weights=thirds, cache=thirds, activations=thirds
        )
        return Policy(**fields | changes)

    return make


@pytest.fixture(autouse=True, scope="module")
def _small_pages() -> Iterator[None]:
    """Pages and pieces so small that a tiny model has several."""
    with piece_sizes(page_tokens=4, memory_page_tokens=8, weight_bytes=4096):
        yield


@pytest.fixture
def threads() -> Callable[[], set[str]]:
    """Names of the threads that flexgen has running."""
    return lambda: {t.name for t in threading.enumerate() if t.name.startswith("flexgen-")}


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that the head computed, in order."""
    counts: list[int] = []
    forward = Head.forward

    def counted(self: Head, x: Any, *args: Any) -> Any:
        result = forward(self, x, *args)
        counts.append(len(x))  # not if it ends because it cannot be recorded
        return result

    monkeypatch.setattr(Head, "forward", counted)
    return counts


@pytest.fixture(scope="session")
def without_sharing() -> Callable[..., np.ndarray]:
    """The ids of a call that shares no prefix, with everything in one memory. Each result is computed once."""
    known: dict[object, np.ndarray] = {}

    def ids(
        directory: str | Path, rows: list[list[int]], tokens: int, stop: Sequence[int] = ()
    ) -> np.ndarray:
        key = str(directory), tuple(map(tuple, rows)), tokens, tuple(stop)
        if key not in known:
            policy = Policy(gpu_batch_size=len(rows), share_prefix=False)
            with OptLM(directory, policy, device="cpu", dtype="float32", progress=False) as lm:
                known[key] = lm.generate(rows, tokens, stop=stop)
                assert lm.stats is not None and lm.stats.prefix == 0
        return known[key]

    return ids
