"""MiMo-V2-Flash: values narrower than keys, and sinks and twice the key heads in layers with a window."""

from __future__ import annotations

from dataclasses import replace

from flexgen.errors import ModelError
from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MixtureSpec
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
    _check_published(fields, layers)
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


def _check_published(fields: Fields, layers: list[LayerSpec]) -> None:
    """Refuse fields of published configs with other values than those that transformers assumes."""
    windowed = [layer.attention for layer in layers if layer.attention.window is not None]
    assumed: dict[str, object] = {
        "hybrid_layer_pattern": [int(layer.attention.window is not None) for layer in layers],
        "moe_layer_freq": [int(isinstance(layer.mlp, MixtureSpec)) for layer in layers],
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "layernorm_epsilon": fields.get("rms_norm_eps"),
    }
    for own in windowed:
        assumed |= {
            "swa_num_attention_heads": own.heads,
            "swa_num_key_value_heads": own.kv_heads,
            "swa_head_dim": own.head_dim,
            "swa_v_head_dim": own.value_dim,
            "sliding_window_size": own.window and own.window.size - 1,
            "swa_rope_theta": own.rope and own.rope.theta,
        }
    for field, value in assumed.items():
        fields.one_of(field, (None, value))
    fields.skip("attention_chunk_size", "hybrid_block_size")  # the windows say the same
