"""OLMo 3: OLMo 2 with windows in most layers, and a RoPE for each kind of layer."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import attention, gated_mlp, head_dim, llama_names, model, rms

NAMES = llama_names(
    attention_out="layers.{i}.post_attention_layernorm", mlp_out="layers.{i}.post_feedforward_layernorm"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an OLMo 3 config."""
    bias, norm = fields.flag("attention_bias"), rms(fields, cast="after")
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=QKNormSpec(norm, over="all"),
                rope=fields.rope(head_dim(fields), kind=kind),
                window=window,
            ),
            gated_mlp(fields),
            LayerNorms(attention_out=norm, mlp_out=norm),
        )
        for kind, window in zip(fields.layer_kinds(), fields.windows(), strict=True)
    ]
    return model(fields, NAMES, layers, norm)
