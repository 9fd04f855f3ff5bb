"""Qwen1.5-MoE and Qwen2-57B-A14B: experts, and an expert for all tokens with a gate."""

from __future__ import annotations

from dataclasses import replace

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    alike,
    attention,
    both_in,
    gated_mlp,
    gated_modules,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
    shared_experts,
)

NAMES = llama_names(
    {**MIXTURE_MODULES, **gated_modules("shared.", "layers.{i}.mlp.shared_expert")},
    shared_gate="layers.{i}.mlp.shared_expert_gate",
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Qwen2-MoE config."""
    norm = rms(fields)
    dense = LayerSpec(
        attention(fields, qkv_bias=fields.flag("qkv_bias"), rope=fields.rope(head_dim(fields))),
        gated_mlp(fields),
        both_in(norm),
    )
    experts = mixture(
        fields,
        router(fields, normalised=fields.flag("norm_topk_prob")),
        shared=shared_experts(fields, 1, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = [
        replace(layer, mlp=experts) if chosen else layer
        for layer, chosen in zip(alike(fields, dense), fields.mixtures_by_step(), strict=True)
    ]
    # The config's class has converted them to layer_types.
    fields.skip("max_window_layers", "use_sliding_window")
    return model(fields, NAMES, layers, norm)
