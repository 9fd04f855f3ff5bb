"""Nemotron-4 and Minitron."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, head_dim, layer_norm, llama_names, mlp, model


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Nemotron config."""
    norm, bias = layer_norm(fields, "norm_eps", plus=1.0), fields.flag("attention_bias")
    layer = LayerSpec(
        attention(fields, qkv_bias=bias, out_bias=bias, rope=fields.rope(head_dim(fields), partial=True)),
        mlp(fields, bias=fields.flag("mlp_bias")),
        both_in(norm),
    )
    return model(fields, llama_names(), [layer] * fields.size("num_hidden_layers"), norm)
