"""SmolLM3, which has layers without rotary positions."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a SmolLM3 config."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    rope = fields.rope(head_dim(fields))
    rotates = fields.flags("no_rope_layers")  # despite the name, a layer with 1 rotates
    layers = [
        LayerSpec(
            attention(fields, qkv_bias=bias, out_bias=bias, rope=rope if rotated else None, window=window),
            gated_mlp(fields, bias=fields.flag("mlp_bias")),
            both_in(norm),
        )
        for rotated, window in zip(rotates, fields.windows(), strict=True)
    ]
    # The config's class has converted these to no_rope_layers and layer_types.
    fields.skip("no_rope_layer_interval", "use_sliding_window", "max_window_layers")
    return model(fields, llama_names(), layers, norm)
