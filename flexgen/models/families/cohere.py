"""Command R and R+, Aya."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import attention, gated_mlp, head_dim, layer_norm, llama_names, model


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Cohere config."""
    norm, bias = layer_norm(fields, "layer_norm_eps", bias=False), fields.flag("attention_bias")
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNormSpec(norm, over="each") if fields.flag("use_qk_norm") else None,
            rope=fields.rope(head_dim(fields), interleaved=True),
        ),
        gated_mlp(fields),
        LayerNorms(attention_in=norm),
        residual="parallel",
    )
    layers = [layer] * fields.size("num_hidden_layers")
    return model(fields, llama_names(), layers, norm, logit_scale=fields.number("logit_scale"))
