"""GLM-4-0414 and GLM-Z1: GLM with norms before and after attention and MLP."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec
from flexgen.models.tables import attention, gated_mlp, head_dim, llama_names, model, rms

NAMES = llama_names(
    attention_out="layers.{i}.post_self_attn_layernorm", mlp_out="layers.{i}.post_mlp_layernorm"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GLM-4 config."""
    norm, rope = rms(fields), fields.rope(head_dim(fields), partial=True, interleaved=True)
    layer = LayerSpec(
        attention(fields, qkv_bias=fields.flag("attention_bias"), rope=rope),
        gated_mlp(fields, fused=True),
        LayerNorms(attention_in=norm, attention_out=norm, mlp_in=norm, mlp_out=norm),
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm)
