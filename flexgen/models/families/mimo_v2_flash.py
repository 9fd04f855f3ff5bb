"""MiMo-V2-Flash: values narrower than keys, and sinks and twice the key heads in layers with a window."""

from __future__ import annotations

from dataclasses import replace

from flexgen.errors import ModelError
from flexgen.models.fields import Fields
from flexgen.models.spec import AttentionSpec, LayerSpec, ModelSpec, ScoreSpec, ValueSpec
from flexgen.models.tables import (
    MIXTURE_MODULES,
    attention,
    both_in,
    gated_mlp,
    grouped_router,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
)

NAMES = llama_names(
    MIXTURE_MODULES,
    correction="layers.{i}.mlp.gate.e_score_correction_bias",
    sinks=("layers.{i}.self_attn.attention_sink_bias", "layers.{i}.self_attn.sinks"),
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a MiMo-V2-Flash config."""
    norm = rms(fields)
    experts, dense = mixture(fields, grouped_router(fields)), gated_mlp(fields)
    layers = [
        LayerSpec(
            replace(_attention(fields, kind), window=window),
            dense if mlp == "dense" else experts,
            both_in(norm),
        )
        for kind, window, mlp in zip(fields.layer_kinds(), fields.windows(), fields.mlp_kinds(), strict=True)
    ]
    return model(fields, NAMES, layers, norm)


def _attention(fields: Fields, kind: str) -> AttentionSpec:
    size, values = head_dim(fields), fields.size("v_head_dim")
    if values > size:
        raise ModelError(f"{fields.name}: v_head_dim = {values} exceeds head_dim = {size}")
    scale = 1.0 if fields.get("attention_value_scale") is None else fields.number("attention_value_scale")
    own = attention(
        fields,
        qkv_bias=fields.flag("attention_bias"),
        rope=fields.rope(size, partial=True, kind=kind),
        values=ValueSpec(scale=scale, dim=None if values == size else values),
    )
    if kind == "full_attention":
        return own
    fields.multiple("num_attention_heads", own.heads, "twice num_key_value_heads", 2 * own.kv_heads)
    return replace(own, kv_heads=2 * own.kv_heads, scores=ScoreSpec(sinks=True))
