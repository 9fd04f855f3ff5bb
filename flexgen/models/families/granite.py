"""Granite 3, dense."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec
from flexgen.models.sources import Names
from flexgen.models.spec import LayerSpec, ModelSpec, ScoreSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Granite config."""
    return granite(fields, llama_names(), gated_mlp(fields, bias=fields.flag("mlp_bias")))


def granite(fields: Fields, names: Names, mlp: MLPSpec | MixtureSpec) -> ModelSpec:
    """A Granite model with this second half of its layers."""
    bias, norm = fields.flag("attention_bias"), rms(fields)
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=bias,
            out_bias=bias,
            rope=fields.rope(head_dim(fields)),
            scores=ScoreSpec(scale=fields.number("attention_multiplier")),
        ),
        mlp,
        both_in(norm),
        residual_scale=fields.number("residual_multiplier"),
    )
    return model(
        fields,
        names,
        [layer] * fields.size("num_hidden_layers"),
        norm,
        embed_scale=fields.number("embedding_multiplier"),
        logit_scale=1 / fields.positive("logits_scaling"),
    )
