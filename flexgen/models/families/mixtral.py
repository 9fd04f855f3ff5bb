"""Mixtral 8x7B and 8x22B: Mistral with experts."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import (
    MIXTRAL_MODULES,
    alike,
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
    """The spec of a Mixtral config."""
    norm = rms(fields)
    layer = LayerSpec(
        attention(fields, rope=fields.rope(head_dim(fields))),
        mixture(fields, router(fields, "num_local_experts", normalised=True), "intermediate_size"),
        both_in(norm),
    )
    return model(fields, llama_names(MIXTRAL_MODULES), alike(fields, layer), norm)
