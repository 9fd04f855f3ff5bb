"""MiniMax-M2."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import (
    MIXTRAL_MODULES,
    attention,
    both_in,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
)

NAMES = llama_names(
    MIXTRAL_MODULES,
    correction=tuple(
        f"layers.{{i}}.{folder}.e_score_correction_bias" for folder in ("block_sparse_moe", "mlp")
    ),
)
_PUBLISHED = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
}


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a MiniMax-M2 config."""
    norm = rms(fields)
    layer = LayerSpec(
        attention(fields, qk_norm=QKNormSpec(norm, "all"), rope=fields.rope(head_dim(fields), partial=True)),
        mixture(
            fields,
            router(fields, "num_local_experts", score="sigmoid", correction=True, normalised=True),
            "intermediate_size",
        ),
        both_in(norm),
    )
    # The fields of published configs of which transformers implements one value each.
    for field, value in _PUBLISHED.items():
        fields.one_of(field, (None, value))
    fields.one_of("attn_type_list", (None, [1] * fields.size("num_hidden_layers")))
    fields.skip("rotary_dim")  # the config's class has converted it to partial_rotary_factor
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm)
