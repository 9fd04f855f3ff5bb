"""Granite with experts and an MLP for all tokens."""

from __future__ import annotations

from flexgen.models.families.granitemoe import granite_mixture
from flexgen.models.fields import Fields
from flexgen.models.spec import ModelSpec
from flexgen.models.tables import shared_experts


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GraniteMoeShared config."""
    there = int(fields.count("shared_intermediate_size") > 0)
    return granite_mixture(fields, shared_experts(fields, there, "shared_intermediate_size", fused=True))
