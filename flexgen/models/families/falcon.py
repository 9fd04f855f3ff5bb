"""Falcon 7B, 11B, 40B and 180B, and with ALiBi, those of RefinedWeb (RW)."""

from __future__ import annotations

import torch

from flexgen.kernels.scoring import alibi_slopes
from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import prefixed
from flexgen.models.spec import AttentionSpec, LayerNorms, LayerSpec, ModelSpec, ScoreSpec
from flexgen.models.tables import both_in, head_dim, layer_norm, model


def _slopes(heads: int, size: int) -> tuple[float, ...]:
    """ALiBi's slopes. They are rounded to bfloat16 and divided like the scores, as in transformers."""
    rounded = torch.tensor(alibi_slopes(heads)).bfloat16().tolist()
    return tuple(slope * size**-0.5 for slope in rounded)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Falcon config."""
    norm, bias = layer_norm(fields, "layer_norm_epsilon"), fields.flag("bias")
    heads, new = fields.size("num_attention_heads"), fields.flag("new_decoder_architecture")
    if new:
        kv_heads = fields.size("num_kv_heads")
    else:
        fields.skip("num_kv_heads")  # transformers does not use it either
        kv_heads = 1 if fields.flag("multi_query") else heads
    fields.multiple("num_attention_heads", heads, "num_kv_heads", kv_heads)
    own_norms = fields.one_of("num_ln_in_parallel_attn", (None, 1, 2)) != 1 and new
    fields.skip("multi_query", "parallel_attn")  # only used without new_decoder_architecture
    alibi = bool(fields.one_of("alibi", (None, False, True)))
    if alibi:
        fields.skip("rope_parameters")
    parallel = new or fields.flag("parallel_attn")
    layer = LayerSpec(
        AttentionSpec(
            heads,
            kv_heads,
            head_dim(fields),
            qkv="groups",
            qkv_bias=bias,
            out_bias=bias,
            rope=None if alibi else fields.rope(head_dim(fields)),
            scores=ScoreSpec(alibi=_slopes(heads, head_dim(fields)) if alibi else ()),
        ),
        MLPSpec(fields.size("ffn_hidden_size"), fields.activation("activation"), bias=bias),
        LayerNorms(attention_in=norm) if parallel and not own_norms else both_in(norm),
        residual="parallel" if parallel else "serial",
    )
    names = prefixed(
        ("transformer.", ""),
        {
            "embed": "word_embeddings",
            "attention_in": "h.{i}.ln_attn" if own_norms else "h.{i}.input_layernorm",
            "qkv": "h.{i}.self_attention.query_key_value",
            "out": "h.{i}.self_attention.dense",
            "mlp_in": "h.{i}.ln_mlp" if own_norms else "h.{i}.post_attention_layernorm",
            "up": "h.{i}.mlp.dense_h_to_4h",
            "down": "h.{i}.mlp.dense_4h_to_h",
            "final_norm": "ln_f",
        },
    ) | {"head": ("lm_head",)}
    return model(fields, names, [layer] * fields.size("num_hidden_layers"), norm)
