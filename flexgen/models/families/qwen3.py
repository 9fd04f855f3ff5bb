"""Qwen3, dense."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import alike, attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Qwen3 config."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    layer = LayerSpec(
        attention(
            fields, qkv_bias=bias, out_bias=bias, qk_norm=QKNormSpec(norm), rope=fields.rope(head_dim(fields))
        ),
        gated_mlp(fields),
        both_in(norm),
    )
    fields.skip(
        "max_window_layers", "use_sliding_window"
    )  # the config's class has converted them to layer_types
    return model(fields, llama_names(), alike(fields, layer), norm)
