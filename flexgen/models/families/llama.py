"""Llama 1, 2 and 3, and the checkpoints of other houses that carry its model_type."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flexgen.models import fields
from flexgen.models.spec import (
    AttentionSpec,
    LayerNorms,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
    prefixed,
)

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import LlamaConfig

NAMES = prefixed(
    ("model.", ""),
    {
        "embed": "embed_tokens",
        "attention_in": "layers.{i}.input_layernorm",
        "q": "layers.{i}.self_attn.q_proj",
        "k": "layers.{i}.self_attn.k_proj",
        "v": "layers.{i}.self_attn.v_proj",
        "out": "layers.{i}.self_attn.o_proj",
        "mlp_in": "layers.{i}.post_attention_layernorm",
        "gate": "layers.{i}.mlp.gate_proj",
        "up": "layers.{i}.mlp.up_proj",
        "down": "layers.{i}.mlp.down_proj",
        "final_norm": "norm",
    },
) | {"head": ("lm_head",)}


def to_spec(config: LlamaConfig, name: str) -> ModelSpec:
    """The spec of a Llama config. Raises ModelError for what the layers do not compute."""
    fields.check_neutral(config, name)
    hidden_size, head_dim = (fields.size(config, name, f) for f in ("hidden_size", "head_dim"))
    num_heads, num_kv_heads = (
        fields.size(config, name, f) for f in ("num_attention_heads", "num_key_value_heads")
    )
    fields.multiple(name, "num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
    fields.multiple(name, "head_dim", head_dim, "the two of a rotating pair", 2)
    rope = fields.rope(config, name, head_dim)
    norm = NormSpec("rms", fields.number(config, name, "rms_norm_eps"))
    bias = fields.flag(config, name, "attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            heads=num_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
            rope=rope,
        ),
        mlp=MLPSpec(
            size=fields.size(config, name, "intermediate_size"),
            activation=fields.activation(config, name, "hidden_act"),
            gated=True,
            bias=fields.flag(config, name, "mlp_bias"),
        ),
        norms=LayerNorms(attention_in=norm, mlp_in=norm),
    )
    vocab_size = fields.size(config, name, "vocab_size")
    return ModelSpec(
        name=name,
        family="llama",
        names=NAMES,
        dtype=fields.dtype_of(config, name),
        layers=(layer,) * fields.size(config, name, "num_hidden_layers"),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_positions=_context(fields.size(config, name, "max_position_embeddings"), rope),
        embed_size=hidden_size,
        bos_token_id=fields.token_id(config, name, "bos_token_id"),
        pad_token_id=fields.token_id(config, name, "pad_token_id"),
        eos_token_ids=fields.token_ids(config.eos_token_id, name, "eos_token_id", vocab_size),
        final_norm=norm,
        tied_head=fields.flag(config, name, "tie_word_embeddings"),
    )


def _context(stated: int, rope: RopeSpec) -> int:
    """Positions of the context that the scaling gives.

    `stated` is the config's max_position_embeddings. It is the length before scaling in a config that has no
    original_max_position_embeddings; in others it usually is the length after scaling.
    """
    return max(stated, math.floor(rope.original_max_positions * rope.factor))
