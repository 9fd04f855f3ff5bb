"""Phi-1, 1.5 and 2."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import attention, head_dim, layer_norm, llama_names, mlp, model

NAMES = llama_names(
    out="layers.{i}.self_attn.dense",
    q_norm="layers.{i}.self_attn.q_layernorm",
    k_norm="layers.{i}.self_attn.k_layernorm",
    up="layers.{i}.mlp.fc1",
    down="layers.{i}.mlp.fc2",
    final_norm="final_layernorm",
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Phi config."""
    norm = layer_norm(fields, "layer_norm_eps")
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=True,
            out_bias=True,
            qk_norm=QKNormSpec(norm) if fields.flag("qk_layernorm") else None,
            rope=fields.rope(head_dim(fields), partial=True),
        ),
        mlp(fields, bias=True),
        LayerNorms(attention_in=norm),
        residual="parallel",
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm, head_bias=True)
