"""ERNIE 4.5 with experts, as a text model."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.sources import OneRow
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    attention,
    both_in,
    gated_mlp,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
    shared_experts,
)

_BIAS = "moe_statics.e_score_correction_bias"
NAMES = llama_names(
    MIXTURE_MODULES,
    correction=(OneRow(f"layers.{{i}}.mlp.{_BIAS}"), OneRow(f"layers.{{i}}.mlp.gate.{_BIAS}")),
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an ERNIE 4.5 MoE config."""
    norm, bias = rms(fields), fields.flag("use_bias")
    own = attention(
        fields, qkv_bias=bias, out_bias=bias, rope=fields.rope(head_dim(fields), interleaved=True)
    )
    experts = mixture(
        fields,
        router(
            fields,
            "moe_num_experts",
            "moe_k",
            correction=True,
            normalised=True,
            least_sum=fields.number("moe_norm_min"),
            wide=True,
        ),
        shared=shared_experts(fields, fields.count("moe_num_shared_experts"), bias=bias),
    )
    dense = gated_mlp(fields, bias=bias)
    first, last = fields.count("moe_layer_start_index"), fields.count("moe_layer_end_index")
    step = fields.size("moe_layer_interval")
    layers = [
        LayerSpec(own, experts if first <= i <= last and (i + 1) % step == 0 else dense, both_in(norm))
        for i in range(fields.size("num_hidden_layers"))
    ]
    fields.skip("moe_capacity")  # for training
    fields.one_of("moe_gate", (None, "topk"))
    fields.one_of("moe_use_aux_free", (None, True))
    return model(fields, NAMES, layers, norm, head_bias=bias)
