"""Command R7B and Command A: layers without a window do not rotate."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec
from flexgen.models.tables import attention, gated_mlp, head_dim, layer_norm, llama_names, model


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Cohere2 config."""
    norm, bias = layer_norm(fields, "layer_norm_eps", bias=False), fields.flag("attention_bias")
    rope = fields.rope(head_dim(fields), interleaved=True)
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                rope=rope if kind == "sliding_attention" else None,
                window=window,
            ),
            gated_mlp(fields),
            LayerNorms(attention_in=norm),
            residual="parallel",
        )
        for kind, window in zip(fields.layer_kinds(), fields.windows(), strict=True)
    ]
    return model(fields, llama_names(), layers, norm, logit_scale=fields.number("logit_scale"))
