"""OLMo 2: norms after attention and MLP, and of all queries and all keys."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import attention, gated_mlp, head_dim, llama_names, model, rms

NAMES = llama_names(
    attention_out="layers.{i}.post_attention_layernorm", mlp_out="layers.{i}.post_feedforward_layernorm"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an OLMo 2 config."""
    bias, norm = fields.flag("attention_bias"), rms(fields, cast="after")
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNormSpec(norm, over="all"),
            rope=fields.rope(head_dim(fields)),
        ),
        gated_mlp(fields),
        LayerNorms(attention_out=norm, mlp_out=norm),
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm)
