"""Arcee AFM 4.5B."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, head_dim, llama_names, mlp, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an Arcee config."""
    norm, bias = rms(fields), fields.flag("attention_bias")
    layer = LayerSpec(
        attention(fields, qkv_bias=bias, out_bias=bias, rope=fields.rope(head_dim(fields))),
        mlp(fields, bias=fields.flag("mlp_bias")),
        both_in(norm),
    )
    return model(fields, llama_names(), [layer] * fields.size("num_hidden_layers"), norm)
