"""Phi-3 and Phi-4."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import alike, attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Phi-3 config."""
    norm = rms(fields)
    for field in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini
        fields.one_of(field, (None, 1))
    layer = LayerSpec(
        attention(fields, qkv="rows", rope=fields.rope(head_dim(fields), partial=True)),
        gated_mlp(fields, fused=True),
        both_in(norm),
    )
    return model(fields, llama_names(), alike(fields, layer), norm)
