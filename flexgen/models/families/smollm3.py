"""SmolLM3, which has layers without rotary positions."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a SmolLM3 config."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    rope, rotates = (
        fields.rope(head_dim(fields)),
        fields.flags("no_rope_layers"),
    )  # 1: it rotates, despite the name
    layers = [
        LayerSpec(
            attention(fields, qkv_bias=bias, out_bias=bias, rope=rope if rotated else None, window=window),
            gated_mlp(fields, bias=fields.flag("mlp_bias")),
            both_in(norm),
        )
        for rotated, window in zip(rotates, fields.windows(), strict=True)
    ]
    fields.skip(
        "no_rope_layer_interval", "use_sliding_window", "max_window_layers"
    )  # the config's class has made lists of them
    return model(fields, llama_names(), layers, norm)
