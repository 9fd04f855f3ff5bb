"""Mistral 7B, Nemo, Small and Codestral."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import alike, attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Mistral config."""
    norm = rms(fields)
    layer = LayerSpec(attention(fields, rope=fields.rope(head_dim(fields))), gated_mlp(fields), both_in(norm))
    return model(fields, llama_names(), alike(fields, layer), norm)
