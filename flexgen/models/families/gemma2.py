"""Gemma 2: windows in every other layer, and caps of scores and logits."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, ScoreSpec
from flexgen.models.tables import attention, gated_mlp, gemma_scales, head_dim, llama_names, model, rms

NAMES = llama_names(
    attention_out="layers.{i}.post_attention_layernorm",
    mlp_in="layers.{i}.pre_feedforward_layernorm",
    mlp_out="layers.{i}.post_feedforward_layernorm",
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Gemma 2 config."""
    bias, norm = fields.flag("attention_bias"), rms(fields, plus=1.0, cast="after")
    fields.one_of("use_bidirectional_attention", (None, False))
    fields.skip("hidden_act")  # transformers reads hidden_activation
    rope = fields.rope(head_dim(fields))
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                rope=rope,
                scores=ScoreSpec(
                    scale=fields.positive("query_pre_attn_scalar") ** -0.5,
                    cap=fields.cap("attn_logit_softcapping"),
                ),
                window=window,
            ),
            gated_mlp(fields, field="hidden_activation"),
            LayerNorms(norm, norm, norm, norm),
        )
        for window in fields.windows()
    ]
    return model(fields, NAMES, layers, norm, **gemma_scales(fields))
