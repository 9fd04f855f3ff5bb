"""Granite 3 with experts, and PowerMoE."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import Stacked
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, head_dim, llama_names, mixture, model, rms, router

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
    return granite(fields, None)


def granite(fields: Fields, shared: MLPSpec | None) -> ModelSpec:
    """A Granite model with experts. shared: the MLP for all tokens."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=bias,
            out_bias=bias,
            rope=fields.rope(head_dim(fields)),
            score_scale=fields.number("attention_multiplier"),
        ),
        mixture(
            fields, router(fields, "num_local_experts", scored="chosen"), "intermediate_size", shared=shared
        ),
        both_in(norm),
        residual_scale=fields.number("residual_multiplier"),
    )
    return model(
        fields,
        NAMES,
        [layer] * fields.size("num_hidden_layers"),
        norm,
        embed_scale=fields.number("embedding_multiplier"),
        logit_scale=1 / fields.positive("logits_scaling"),
    )
