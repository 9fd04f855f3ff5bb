"""Seed-OSS."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Seed-OSS config."""
    norm = rms(fields)
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=fields.flag("attention_bias"),
            out_bias=fields.flag("attention_out_bias"),
            rope=fields.rope(head_dim(fields)),
        ),
        gated_mlp(fields, bias=fields.flag("mlp_bias")),
        both_in(norm),
    )
    return model(fields, llama_names(), [layer] * fields.size("num_hidden_layers"), norm)
