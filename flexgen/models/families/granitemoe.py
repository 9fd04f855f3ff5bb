"""Granite 3 with experts, and PowerMoE."""

from __future__ import annotations

from flexgen.models.families.granite import granite
from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import Stacked
from flexgen.models.spec import ModelSpec
from flexgen.models.tables import llama_names, mixture, router

_MIXTURE = "layers.{i}.block_sparse_moe"
_INTO = f"{_MIXTURE}.input_linear.weight", f"{_MIXTURE}.experts.gate_up_proj"
_OUT = f"{_MIXTURE}.output_linear.weight", f"{_MIXTURE}.experts.down_proj"
NAMES = llama_names(
    {
        "router": (f"{_MIXTURE}.router.layer", f"{_MIXTURE}.router"),
        "experts.gate": tuple(Stacked(name, 0, 2) for name in _INTO),
        "experts.up": tuple(Stacked(name, 1, 2) for name in _INTO),
        "experts.down": tuple(Stacked(name) for name in _OUT),
        "shared.gate_up": "layers.{i}.shared_mlp.input_linear",
        "shared.down": "layers.{i}.shared_mlp.output_linear",
    }
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GraniteMoe config."""
    return granite_mixture(fields, None)


def granite_mixture(fields: Fields, shared: MLPSpec | None) -> ModelSpec:
    """A Granite model with experts. shared: the MLP for all tokens."""
    chosen = router(fields, "num_local_experts", scored="chosen")
    return granite(fields, NAMES, mixture(fields, chosen, "intermediate_size", shared=shared))
