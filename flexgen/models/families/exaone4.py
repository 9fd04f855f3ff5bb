"""EXAONE 4: norms after attention and MLP; with windows, layers without one do not rotate."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import attention, gated_mlp, head_dim, llama_names, model, rms

NAMES = llama_names(
    attention_out="layers.{i}.post_attention_layernorm", mlp_out="layers.{i}.post_feedforward_layernorm"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an EXAONE 4 config."""
    norm, rope = rms(fields), fields.rope(head_dim(fields))
    windowed = fields.get("sliding_window") is not None
    fields.skip("sliding_window_pattern")  # the config's class has converted it to layer_types
    layers = [
        LayerSpec(
            attention(
                fields,
                qk_norm=QKNormSpec(norm),
                rope=rope if kind == "sliding_attention" or not windowed else None,
                window=window,
            ),
            gated_mlp(fields),
            LayerNorms(attention_out=norm, mlp_out=norm),
        )
        for kind, window in zip(fields.layer_kinds(), fields.windows(), strict=True)
    ]
    return model(fields, NAMES, layers, norm)
