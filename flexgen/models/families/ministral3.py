"""Ministral 3 as a text model."""

from __future__ import annotations

from flexgen.errors import ModelError, shown
from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec, QueryScaling, ScoreSpec
from flexgen.models.tables import alike, attention, both_in, gated_mlp, head_dim, llama_names, model, rms

_BETA = "llama_4_scaling_beta"


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Ministral 3 config."""
    norm, rope = rms(fields), fields.rope(head_dim(fields), others=(_BETA, "max_position_embeddings"))
    beta = fields.get("rope_parameters").get(_BETA)
    if not isinstance(beta, int | float):
        raise ModelError(f"{fields.name}: {_BETA} = {shown(beta)} in rope_parameters is not a number")
    scaling = QueryScaling(float(beta), rope.original_max_positions)
    layer = LayerSpec(
        attention(fields, rope=rope, scores=ScoreSpec(by_position=scaling)), gated_mlp(fields), both_in(norm)
    )
    return model(fields, llama_names(), alike(fields, layer), norm)
