"""Hunyuan 3 (HY-V3)."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QKNormSpec
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

NAMES = llama_names(
    MIXTURE_MODULES,
    router=("layers.{i}.mlp.router.gate", "layers.{i}.mlp.gate"),
    correction=("layers.{i}.mlp.expert_bias", "layers.{i}.mlp.e_score_correction_bias"),
    **{
        f"shared.{name}": tuple(
            f"layers.{{i}}.mlp.{folder}.{name}_proj" for folder in ("shared_mlp", "shared_experts")
        )
        for name in ("gate", "up", "down")
    },
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an HY-V3 config."""
    norm, bias, mlp_bias = rms(fields), fields.flag("attention_bias"), fields.flag("mlp_bias")
    own = attention(
        fields, qkv_bias=bias, out_bias=bias, qk_norm=QKNormSpec(norm), rope=fields.rope(head_dim(fields))
    )
    experts = mixture(
        fields,
        router(
            fields,
            score="sigmoid",
            correction=True,
            normalised=True,
            least_sum=1e-20,
            scale=fields.number("router_scaling_factor"),
            wide=True,
        ),
        shared=shared_experts(fields, fields.size("num_shared_experts"), bias=mlp_bias),
    )
    dense = gated_mlp(fields, bias=mlp_bias)
    layers = [
        LayerSpec(own, dense if kind == "dense" else experts, both_in(norm)) for kind in fields.mlp_kinds()
    ]
    fields.skip("enable_moe_fp32_combine")  # the outputs of all experts are always added in float32
    return model(fields, NAMES, layers, norm)
