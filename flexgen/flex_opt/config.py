"""The sizes of OPT models, under the names of FlexGen 0.1 and of transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import OPTConfig

from flexgen.errors import ModelError, cut, did_you_mean
from flexgen.models import ModelSpec
from flexgen.models.families.opt import SIZES, known_config

_HALF_BYTES = 2  # printed sizes are for float16, regardless of the dtype of the run
_GALACTICA = "galactica-30b"
_STAGE = "opt-175b-stage"
KNOWN = (*SIZES, _GALACTICA, _STAGE)
"""Names that `get_opt_config` accepts, in addition to OPT-IML's."""


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
        """Bytes of the weights in float16, counted like 0.1, so that logs can be compared."""
        h = self.input_dim
        layer = 12 * h * h + 11 * h
        return _HALF_BYTES * (self.num_hidden_layers * layer + self.vocab_size * (h + 1))

    def cache_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of keys and values in float16, for `batch_size` prompts of `seq_len` tokens each."""
        return 2 * self.num_hidden_layers * self.hidden_bytes(batch_size, seq_len)

    def hidden_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of the hidden states of one layer in float16."""
        return batch_size * seq_len * self.input_dim * _HALF_BYTES


def get_opt_config(name: str, **changes: Any) -> OptConfig:
    """The sizes of "opt-30b", "facebook/opt-30b", an OPT-IML, "galactica-30b" or "opt-175b-stage".

    changes: fields to replace. Raises ModelError for an unknown name.
    """
    short = name.rpartition("/")[2].lower()
    size = _size(short)
    if size is None:
        raise ModelError(
            f"{cut(name)}: there is no OPT model of this name; known: {', '.join(KNOWN)}{did_you_mean(short, KNOWN)}"
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
    """Whether these are the sizes of the model that the hub has under `config.name`."""
    return config.name != _STAGE and _size(config.name) is not None and config == get_opt_config(config.name)


def to_transformers(config: OptConfig) -> OPTConfig:
    """The transformers configuration of the same model. Raises ModelError for an unsupported layer_norm_eps."""
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
    """The sizes of an OPT model, under the names of 0.1."""
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
    """The key in `SIZES` of the architecture of a model of 0.1, or None."""
    if name == _GALACTICA:
        return "opt-30b"
    if name == _STAGE:
        return "opt-175b"
    plain = name.replace("-iml-max", "").replace("-iml", "")
    return plain if plain in SIZES else None
