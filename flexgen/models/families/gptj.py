"""GPT-J."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec
from flexgen.models.tables import attention, gpt_mlp, gpt_names, gpt_rope, layer_norm, model

NAMES = gpt_names(
    q="h.{i}.attn.q_proj",
    k="h.{i}.attn.k_proj",
    v="h.{i}.attn.v_proj",
    out="h.{i}.attn.out_proj",
    up="h.{i}.mlp.fc_in",
    down="h.{i}.mlp.fc_out",
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GPT-J config."""
    norm = layer_norm(fields, "layer_norm_epsilon")
    fields.one_of("rotary", (None, True))
    fields.one_of("scale_attn_weights", (None, True))
    layer = LayerSpec(
        attention(fields, rope=gpt_rope(fields)),
        gpt_mlp(fields),
        LayerNorms(attention_in=norm),
        residual="parallel",
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm, head_bias=True)
