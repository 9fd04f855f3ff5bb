"""Llama 1, 2 and 3, and other models with its architecture."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Llama config."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    layer = LayerSpec(
        attention(fields, qkv_bias=bias, out_bias=bias, rope=fields.rope(head_dim(fields))),
        gated_mlp(fields, bias=fields.flag("mlp_bias")),
        both_in(norm),
    )
    layers = [layer] * len(fields.layer_kinds(supported=("full_attention",)))
    return model(fields, llama_names(), layers, norm)
