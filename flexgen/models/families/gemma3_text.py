"""Gemma 3 as a text model: windows in five of six layers, and a RoPE for each kind of layer."""

from __future__ import annotations

from flexgen.models.families.gemma2 import NAMES
from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec, ScoreSpec
from flexgen.models.tables import attention, gated_mlp, gemma_scales, head_dim, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Gemma 3 text config."""
    bias, norm = fields.flag("attention_bias"), rms(fields, plus=1.0, cast="after")
    fields.one_of("use_bidirectional_attention", (None, False))
    fields.skip("hidden_act")  # transformers reads hidden_activation
    fields.skip("sliding_window_pattern")  # the config's class has converted it to layer_types
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=QKNormSpec(norm),
                rope=fields.rope(head_dim(fields), kind=kind),
                scores=ScoreSpec(scale=fields.positive("query_pre_attn_scalar") ** -0.5),
                window=window,
            ),
            gated_mlp(fields, field="hidden_activation"),
            LayerNorms(norm, norm, norm, norm),
        )
        for kind, window in zip(fields.layer_kinds(), fields.windows(), strict=True)
    ]
    return model(fields, NAMES, layers, norm, **gemma_scales(fields))
