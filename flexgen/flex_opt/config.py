"""OPT's sizes as FlexGen 0.1 describes them, and as transformers does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import OPTConfig

from flexgen.errors import ModelError, cut, did_you_mean
from flexgen.models import ModelSpec
from flexgen.models.families.opt import SIZES, known_config

_HALF_BYTES = 2  # sizes are printed for float16, whatever the run computes in
_GALACTICA = "galactica-30b"
_STAGE = "opt-175b-stage"
KNOWN = (*SIZES, _GALACTICA, _STAGE)
"""Names that `get_opt_config` knows, next to OPT-IML's."""


@dataclass(frozen=True)
class OptConfig:
    """An OPT model's sizes under the names of FlexGen 0.1. The defaults are opt-125m's."""

    name: str = "opt-125m"
    num_hidden_layers: int = 12
    max_seq_len: int = 2048
    hidden_size: int = 768
    n_head: int = 12
    input_dim: int = 768
    ffn_embed_dim: int = 3072
    pad: int = 1
    activation_fn: str = "relu"
    vocab_size: int = 50272
    layer_norm_eps: float = 0.00001
    pad_token_id: int = 1
    dtype: type = np.float16

    def model_bytes(self) -> int:
        """Of the weights in float16, counted as 0.1 counts them, so that its logs and these compare."""
        h = self.input_dim
        layer = 12 * h * h + 11 * h
        return _HALF_BYTES * (self.num_hidden_layers * layer + self.vocab_size * (h + 1))

    def cache_bytes(self, batch_size: int, seq_len: int) -> int:
        """Of keys and values in float16, of `batch_size` prompts with `seq_len` tokens each."""
        return 2 * self.num_hidden_layers * self.hidden_bytes(batch_size, seq_len)

    def hidden_bytes(self, batch_size: int, seq_len: int) -> int:
        """Of the hidden states of one layer in float16."""
        return batch_size * seq_len * self.input_dim * _HALF_BYTES


def get_opt_config(name: str, **changes: Any) -> OptConfig:
    """The sizes of "opt-30b", "facebook/opt-30b", an OPT-IML, "galactica-30b" or "opt-175b-stage".

    changes: fields to set to something else. Raises ModelError for a name that is not known.
    """
    short = name.rpartition("/")[2].lower()
    size = _size(short)
    if size is None:
        raise ModelError(
            f"{cut(name)}: no OPT model of this name; known: {', '.join(KNOWN)}{did_you_mean(short, KNOWN)}"
        )
    num_layers, num_heads, hidden_size = SIZES[size]
    config = OptConfig(
        name=short,
        num_hidden_layers=num_layers,
        n_head=num_heads,
        hidden_size=hidden_size,
        input_dim=hidden_size,
        ffn_embed_dim=4 * hidden_size,
    )
    if short == _GALACTICA:
        config = dataclasses.replace(config, vocab_size=50000, activation_fn="gelu")
    elif short == _STAGE:
        config = dataclasses.replace(config, num_hidden_layers=num_layers // 4)
    return dataclasses.replace(config, **changes)


def is_published(config: OptConfig) -> bool:
    """Whether these are the sizes of a model that the hub has under `config.name`."""
    return config.name != _STAGE and _size(config.name) is not None and config == get_opt_config(config.name)


def to_transformers(config: OptConfig) -> OPTConfig:
    """The configuration that transformers would have for it. Raises ModelError for fields that do not agree."""
    if config.layer_norm_eps != OptConfig.layer_norm_eps:
        raise ModelError(
            f"{config.name}: layer_norm_eps = {config.layer_norm_eps} is not supported; "
            f"supported: {OptConfig.layer_norm_eps}"
        )
    made = known_config(_size(config.name) or "opt-125m")
    projected = made.word_embed_proj_dim != made.hidden_size
    made.update(
        {
            "num_hidden_layers": config.num_hidden_layers,
            "max_position_embeddings": config.max_seq_len,
            "hidden_size": config.input_dim,
            "num_attention_heads": config.n_head,
            "ffn_dim": config.ffn_embed_dim,
            "word_embed_proj_dim": made.word_embed_proj_dim if projected else config.input_dim,
            "activation_function": config.activation_fn,
            "vocab_size": config.vocab_size,
            "pad_token_id": config.pad_token_id,
            "dtype": np.dtype(config.dtype).name,
            "name_or_path": config.name,
        }
    )
    return made


def from_spec(spec: ModelSpec, name: str) -> OptConfig:
    """What 0.1 would have called the sizes of an OPT model's own configuration."""
    layer = spec.layers[0]
    return OptConfig(
        name=name,
        num_hidden_layers=spec.num_layers,
        max_seq_len=spec.max_positions,
        hidden_size=spec.hidden_size,
        n_head=layer.attention.heads,
        input_dim=spec.hidden_size,
        ffn_embed_dim=layer.mlp.size,
        activation_fn=layer.mlp.activation,
        vocab_size=spec.vocab_size,
        pad_token_id=OptConfig.pad_token_id if spec.pad_token_id is None else spec.pad_token_id,
    )


def _size(name: str) -> str | None:
    """The key in `SIZES` of the architecture that a model of 0.1 has."""
    if name == _GALACTICA:
        return "opt-30b"
    if name == _STAGE:
        return "opt-175b"
    plain = name.replace("-iml-max", "").replace("-iml", "")
    return plain if plain in SIZES else None
