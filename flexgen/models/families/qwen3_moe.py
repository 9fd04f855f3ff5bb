"""Qwen3 with experts: 30B-A3B, 235B-A22B and Coder."""

from __future__ import annotations

from dataclasses import replace

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    alike,
    attention,
    both_in,
    gated_mlp,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Qwen3-MoE config."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    dense = LayerSpec(
        attention(
            fields, qkv_bias=bias, out_bias=bias, qk_norm=QKNormSpec(norm), rope=fields.rope(head_dim(fields))
        ),
        gated_mlp(fields),
        both_in(norm),
    )
    experts = mixture(fields, router(fields, normalised=fields.flag("norm_topk_prob")))
    layers = [
        replace(layer, mlp=experts) if chosen else layer
        for layer, chosen in zip(alike(fields, dense), fields.mixtures_by_step(), strict=True)
    ]
    # Without use_sliding_window, the config's class has removed the window.
    fields.skip("max_window_layers", "use_sliding_window")
    return model(fields, llama_names(MIXTURE_MODULES), layers, norm)
