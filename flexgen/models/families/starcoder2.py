"""StarCoder2."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import alike, attention, both_in, head_dim, layer_norm, llama_names, mlp, model

NAMES = llama_names(up="layers.{i}.mlp.c_fc", down="layers.{i}.mlp.c_proj")


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a StarCoder2 config."""
    fields.one_of("norm_type", (None, "layer_norm"))
    fields.one_of("mlp_type", (None, "default"))
    bias, norm = fields.flag("use_bias"), layer_norm(fields, "norm_epsilon")
    layer = LayerSpec(
        attention(fields, qkv_bias=bias, out_bias=bias, rope=fields.rope(head_dim(fields))),
        mlp(fields, bias=bias),
        both_in(norm),
    )
    return model(fields, NAMES, alike(fields, layer), norm)
