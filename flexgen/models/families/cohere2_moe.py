"""Cohere's Command with experts: Cohere2 whose layers have experts, except for the first ones."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    attention,
    head_dim,
    layer_norm,
    llama_names,
    mixture,
    model,
    rms,
    router,
    shared_experts,
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Cohere2Moe config."""
    bias, simple = fields.flag("attention_bias"), fields.get("rms_norm_eps") is not None
    norm = rms(fields) if simple else layer_norm(fields, "layer_norm_eps", bias=False)
    fields.skip("layer_norm_eps")  # not used with an RMS norm
    rope = fields.rope(head_dim(fields), interleaved=True)
    experts, dense, kinds = _experts(fields), _dense(fields), fields.mlp_kinds()
    rotates = fields.get("prefix_dense_sliding_window_pattern") == 1
    fields.skip("sliding_window_pattern")  # the config's class has converted it to layer_types
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                rope=rope if kind == "sliding_attention" or (mlp == "dense" and rotates) else None,
                window=window,
            ),
            dense if mlp == "dense" else experts,
            LayerNorms(attention_in=norm),
            residual="parallel",
        )
        for kind, window, mlp in zip(fields.layer_kinds(), fields.windows(), kinds, strict=True)
    ]
    names = llama_names(MIXTURE_MODULES)
    return model(fields, names, layers, norm, logit_scale=fields.number("logit_scale"))


def _experts(fields: Fields) -> MixtureSpec:
    score = fields.one_of("expert_selection_fn", ("softmax", "sigmoid"))
    normalised = fields.flag("norm_topk_prob") and score == "sigmoid"
    number = fields.count("num_shared_experts")
    average = fields.one_of("shared_expert_combination_strategy", ("average", "sum")) == "average"
    return mixture(
        fields,
        router(fields, scored="chosen", score=score, normalised=normalised),
        "intermediate_size",
        shared=shared_experts(fields, number, "intermediate_size"),
        scale=0.5 if number and average else 1.0,
    )


def _dense(fields: Fields) -> MLPSpec:
    size = fields.size_or("prefix_dense_intermediate_size", fields.size("intermediate_size"))
    return MLPSpec(size, fields.activation(), gated=True)
