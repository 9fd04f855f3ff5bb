"""GLM-4.5, 4.6 and 4.7, and Air."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    attention,
    both_in,
    gated_mlp,
    grouped_router,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    shared_experts,
)

NAMES = llama_names(MIXTURE_MODULES, correction="layers.{i}.mlp.gate.e_score_correction_bias")


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GLM-4.5 config."""
    norm = rms(fields)
    own = attention(
        fields,
        qkv_bias=fields.flag("attention_bias"),
        qk_norm=QKNormSpec(norm) if fields.flag("use_qk_norm") else None,
        rope=fields.rope(head_dim(fields), partial=True),
    )
    experts = mixture(
        fields,
        grouped_router(fields),
        shared=shared_experts(fields, fields.size("n_shared_experts")),
    )
    dense, first = gated_mlp(fields), fields.count("first_k_dense_replace")
    layers = [
        LayerSpec(own, dense if i < first else experts, both_in(norm))
        for i in range(fields.size("num_hidden_layers"))
    ]
    return model(fields, NAMES, layers, norm)
