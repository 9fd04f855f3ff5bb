"""AFMoE (Trinity): gated attention, norms before and after, and layers without a window do not rotate."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    attention,
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
    router="layers.{i}.mlp.router.gate",
    correction="layers.{i}.mlp.expert_bias",
    attention_out="layers.{i}.post_attention_layernorm",
    mlp_in="layers.{i}.pre_mlp_layernorm",
    mlp_out="layers.{i}.post_mlp_layernorm",
)
_PUBLISHED = {
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
}


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an AFMoE config."""
    norm, bias = rms(fields, cast="after"), fields.flag("attention_bias")
    rope = fields.rope(head_dim(fields))
    experts = mixture(
        fields,
        router(
            fields,
            score="sigmoid",
            correction=True,
            normalised=True,
            least_sum=1e-20,
            scale=fields.number("route_scale"),
        ),
        shared=shared_experts(fields, fields.count("num_shared_experts")),
    )
    dense, first = gated_mlp(fields), fields.count("num_dense_layers")
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=QKNormSpec(norm),
                rope=rope if kind == "sliding_attention" else None,
                gate=True,
                window=window,
            ),
            dense if i < first else experts,
            LayerNorms(norm, norm, norm, norm),
        )
        for i, (kind, window) in enumerate(zip(fields.layer_kinds(), fields.windows(), strict=True))
    ]
    fields.skip("global_attn_every_n_layers")  # the config's class has converted it to layer_types
    fields.skip("load_balance_coeff", "use_grouped_mm")  # for training
    for field, value in _PUBLISHED.items():  # of which transformers implements one value each
        fields.one_of(field, (None, value))
    scale = fields.size("hidden_size") ** 0.5 if fields.flag("mup_enabled") else 1.0
    return model(fields, NAMES, layers, norm, embed_scale=scale)
