"""Gemma 1."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Gemma config."""
    bias, norm = fields.flag("attention_bias"), rms(fields, plus=1.0, cast="after")
    fields.one_of("hidden_activation", (None, "gelu_pytorch_tanh"))
    fields.one_of("use_bidirectional_attention", (None, False))
    layer = LayerSpec(
        attention(fields, qkv_bias=bias, out_bias=bias, rope=fields.rope(head_dim(fields))),
        gated_mlp(fields),
        both_in(norm),
    )
    layers = [layer] * fields.size("num_hidden_layers")
    return model(fields, llama_names(), layers, norm, embed_scale=fields.size("hidden_size") ** 0.5)
