"""GPT-2, whose files store matrices as (in, out)."""

from __future__ import annotations

from dataclasses import replace

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, ScoreSpec
from flexgen.models.tables import attention, both_in, gpt_mlp, gpt_names, layer_norm, model

NAMES = gpt_names(
    qkv="h.{i}.attn.c_attn", out="h.{i}.attn.c_proj", up="h.{i}.mlp.c_fc", down="h.{i}.mlp.c_proj"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GPT-2 config."""
    norm = layer_norm(fields, "layer_norm_epsilon")
    heads = attention(fields, qkv="rows", qkv_bias=True, out_bias=True)
    fields.one_of("scale_attn_weights", (True,))
    fields.skip("reorder_and_upcast_attn")  # only the precision
    layer = LayerSpec(heads, gpt_mlp(fields), both_in(norm))
    layers = [layer] * fields.size("num_hidden_layers")
    if fields.flag("scale_attn_by_inverse_layer_idx"):
        layers = [
            replace(layer, attention=replace(heads, scores=ScoreSpec(scale=heads.scale / number)))
            for number, layer in enumerate(layers, 1)
        ]
    return model(
        fields, NAMES, layers, norm, positions="learned", transposed=frozenset({"qkv", "out", "up", "down"})
    )
