"""OLMoE 1B-7B."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    attention,
    both_in,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an OLMoE config."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    fields.one_of("clip_qkv", (None,))
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNormSpec(norm, "all"),
            rope=fields.rope(head_dim(fields)),
        ),
        mixture(fields, router(fields, normalised=fields.flag("norm_topk_prob")), "intermediate_size"),
        both_in(norm),
    )
    return model(fields, llama_names(MIXTURE_MODULES), [layer] * fields.size("num_hidden_layers"), norm)
