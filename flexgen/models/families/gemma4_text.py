"""Gemma 4 (26B-A4B, 31B) as a text model: heads of two sizes, and in 26B-A4B an MLP next to the experts."""

from __future__ import annotations

from flexgen.models.families.gemma2 import NAMES as GEMMA2
from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MixtureNorms, MixtureSpec
from flexgen.models.sources import Stacked
from flexgen.models.spec import (
    AttentionSpec,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    NormSpec,
    QKNormSpec,
    ScoreSpec,
    ValueSpec,
)
from flexgen.models.tables import (
    attention,
    gated_mlp,
    gated_modules,
    gemma_scales,
    head_dim,
    llama_names,
    mixture,
    model,
    rms,
    router,
)

_EXPERTS = "layers.{i}.experts"
_NORM = "layers.{i}.post_feedforward_layernorm"
NAMES = {
    **GEMMA2,
    **llama_names(
        {
            "attention_out": "layers.{i}.post_attention_layernorm",
            "layer_scale": "layers.{i}.layer_scalar",
            "mlp_in": "layers.{i}.pre_feedforward_layernorm",
            "mlp_out": _NORM,
            "router": "layers.{i}.router.proj",
            "router_in": "layers.{i}.router.scale",
            "expert_scale": "layers.{i}.router.per_expert_scale",
            "experts_in": "layers.{i}.pre_feedforward_layernorm_2",
            "experts_out": f"{_NORM}_2",
            "experts.gate": Stacked(f"{_EXPERTS}.gate_up_proj", 0, 2),
            "experts.up": Stacked(f"{_EXPERTS}.gate_up_proj", 1, 2),
            "experts.down": Stacked(f"{_EXPERTS}.down_proj"),
            "shared_in": "layers.{i}.pre_feedforward_layernorm",
            "shared_out": f"{_NORM}_1",
            **gated_modules("shared.", "layers.{i}.mlp"),
        }
    ),
}


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a Gemma 4 text config."""
    norm = rms(fields, cast="after")
    # Only the smallest models have embeddings for each layer, and layers that use the cache of others.
    fields.one_of("hidden_size_per_layer_input", (0, None))
    fields.one_of("num_kv_shared_layers", (0,))
    fields.skip("vocab_size_per_layer_input", "use_double_wide_mlp")
    fields.one_of("use_bidirectional_attention", (None, "vision"))
    mixes = fields.flag("enable_moe_block")
    mlp = _experts(fields, norm) if mixes else gated_mlp(fields, field="hidden_activation")
    norms = LayerNorms(norm, norm, None if mixes else norm, norm)
    kinds, windows = fields.layer_kinds(), fields.windows()
    layers = [
        LayerSpec(_attention(fields, own, norm, kind, window=window), mlp, norms, scaled=True)
        for own, kind, window in zip(fields.of_layers(), kinds, windows, strict=True)
    ]
    return model(fields, NAMES, layers, norm, **gemma_scales(fields))


def _attention(fields: Fields, own: Fields, norm: NormSpec, kind: str, **others: object) -> AttentionSpec:
    """own: the fields of the layer."""
    bias = fields.flag("attention_bias")
    shared = fields.flag("attention_k_eq_v") and kind == "full_attention"
    return attention(
        own,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=QKNormSpec(norm),
        rope=own.rope(head_dim(own), partial=True, kind=kind),
        values=ValueSpec(from_keys=shared, norm=NormSpec("rms", norm.eps, weight=False)),
        scores=ScoreSpec(scale=1.0),
        **others,
    )


def _experts(fields: Fields, norm: NormSpec) -> MixtureSpec:
    return mixture(
        fields,
        router(
            fields,
            top_k="top_k_experts",
            normalised=True,
        ),
        activation="hidden_activation",
        shared=gated_mlp(fields, field="hidden_activation"),
        expert_scale=True,
        norms=MixtureNorms(
            NormSpec("rms", norm.eps), norm, norm, norm, norm, router_scale=fields.size("hidden_size") ** -0.5
        ),
    )
