"""Llama 4 (Scout, Maverick) as a text model: chunks of attention, and in other layers queries scaled by position."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import Stacked
from flexgen.models.spec import LayerSpec, ModelSpec, NormSpec, QKNormSpec, QueryScaling, ScoreSpec
from flexgen.models.tables import (
    attention,
    both_in,
    gated_modules,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
)

_MLP = "layers.{i}.feed_forward"
NAMES = llama_names(
    {
        **gated_modules("", _MLP),
        "router": f"{_MLP}.router",
        "experts.gate_up": Stacked(f"{_MLP}.experts.gate_up_proj"),
        "experts.down": Stacked(f"{_MLP}.experts.down_proj"),
        **gated_modules("shared.", f"{_MLP}.shared_expert"),
    }
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Llama 4 text config."""
    norm, bias = rms(fields), fields.flag("attention_bias")
    rope = fields.rope(head_dim(fields), interleaved=True)
    unweighted = NormSpec("rms", norm.eps, weight=False)
    qk_norm = QKNormSpec(unweighted, after_rope=True) if fields.flag("use_qk_norm") else None
    scaling = QueryScaling(fields.number("attn_scale"), fields.size("floor_scale"), offset=1)
    scaled = fields.flag("attn_temperature_tuning")
    experts = mixture(
        fields,
        router(fields, "num_local_experts", score="sigmoid", scored="chosen"),
        "intermediate_size",
        first="halves",
        weighted="inputs",
        shared=MLPSpec(fields.size("intermediate_size"), fields.activation(), gated=True),
    )
    dense = MLPSpec(fields.size("intermediate_size_mlp"), fields.activation(), gated=True)
    mixes = fields.numbered_layers("moe_layers")
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                rope=rope if rotates else None,
                qk_norm=qk_norm if rotates else None,
                scores=ScoreSpec(by_position=scaling if scaled and not rotates else None),
                window=window,
            ),
            experts if mixed else dense,
            both_in(norm),
        )
        for rotates, window, mixed in zip(fields.flags("no_rope_layers"), fields.chunks(), mixes, strict=True)
    ]
    # The config's class has converted these to no_rope_layers and moe_layers.
    fields.skip("no_rope_layer_interval", "interleave_moe_layer_step")
    fields.skip("for_llm_compressor")
    transposed = frozenset({"experts.gate_up", "experts.down"})
    return model(fields, NAMES, layers, norm, transposed=transposed)
