"""Qwen 1.5, 2 and 2.5, and the R1 distillations of them."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import alike, attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Qwen2 config."""
    norm = rms(fields)
    layer = LayerSpec(
        attention(fields, qkv_bias=True, rope=fields.rope(head_dim(fields))), gated_mlp(fields), both_in(norm)
    )
    fields.skip(
        "max_window_layers", "use_sliding_window"
    )  # the config's class has converted them to layer_types
    return model(fields, llama_names(), alike(fields, layer), norm)
