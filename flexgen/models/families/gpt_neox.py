"""GPT-NeoX and Pythia."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.sources import prefixed
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, head_dim, layer_norm, mlp, model

NAMES = prefixed(
    ("gpt_neox.", ""),
    {
        "embed": "embed_in",
        "attention_in": "layers.{i}.input_layernorm",
        "qkv": "layers.{i}.attention.query_key_value",
        "out": "layers.{i}.attention.dense",
        "mlp_in": "layers.{i}.post_attention_layernorm",
        "up": "layers.{i}.mlp.dense_h_to_4h",
        "down": "layers.{i}.mlp.dense_4h_to_h",
        "final_norm": "final_layer_norm",
    },
) | {"head": ("embed_out", "lm_head")}


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GPT-NeoX config."""
    norm, bias = layer_norm(fields, "layer_norm_eps"), fields.flag("attention_bias")
    layer = LayerSpec(
        attention(
            fields,
            qkv="heads",
            qkv_bias=bias,
            out_bias=bias,
            rope=fields.rope(head_dim(fields), partial=True),
        ),
        mlp(fields, bias=True),
        both_in(norm),
        residual="parallel" if fields.flag("use_parallel_residual") else "serial",
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm)
