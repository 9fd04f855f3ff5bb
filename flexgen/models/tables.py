"""Common parts of the families' tables: names of modules, and specs from fields that many configs have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexgen.errors import ModelError
from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec, RouterSpec
from flexgen.models.rope import rope_spec
from flexgen.models.sources import Name, Names, Stacked, prefixed
from flexgen.models.spec import (
    AttentionSpec,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

Modules = Mapping[str, Name | tuple[Name, ...]]

LLAMA_MODULES = {
    "embed": "embed_tokens",
    "attention_in": "layers.{i}.input_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "qkv": "layers.{i}.self_attn.qkv_proj",
    "q_norm": "layers.{i}.self_attn.q_norm",
    "k_norm": "layers.{i}.self_attn.k_norm",
    "attention_gate": "layers.{i}.self_attn.gate_proj",
    "out": "layers.{i}.self_attn.o_proj",
    "mlp_in": "layers.{i}.post_attention_layernorm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "gate_up": "layers.{i}.mlp.gate_up_proj",
    "down": "layers.{i}.mlp.down_proj",
    "final_norm": "norm",
}
"""The names of modules in the checkpoints of most families."""


def expert_modules(folder: str, gate: str, up: str, down: str) -> dict[str, tuple[Name, ...]]:
    """The names of the experts' matrices: a tensor for each expert and matrix, or two tensors for all experts."""
    stacked = f"layers.{{i}}.{folder}.experts.gate_up_proj"
    return {
        "experts.gate": (f"layers.{{i}}.{folder}.experts.{{e}}.{gate}", Stacked(stacked, 0, 2)),
        "experts.up": (f"layers.{{i}}.{folder}.experts.{{e}}.{up}", Stacked(stacked, 1, 2)),
        "experts.down": (
            f"layers.{{i}}.{folder}.experts.{{e}}.{down}",
            Stacked(f"layers.{{i}}.{folder}.experts.down_proj"),
        ),
    }


def gated_modules(prefix: str, path: str) -> dict[str, str]:
    """The names of the matrices of an MLP in `path`, as modules whose names begin with `prefix`."""
    return {f"{prefix}{name}": f"{path}.{name}_proj" for name in ("gate", "up", "down")}


MIXTRAL_MODULES: dict[str, Name | tuple[Name, ...]] = {
    "router": ("layers.{i}.block_sparse_moe.gate", "layers.{i}.mlp.gate"),
    **{
        module: (*names, *expert_modules("mlp", "gate_proj", "up_proj", "down_proj")[module])
        for module, names in expert_modules("block_sparse_moe", "w1", "w3", "w2").items()
    },
}
"""The names of a mixture's modules in Mixtral's checkpoints, and in those that transformers saves."""

MIXTURE_MODULES: dict[str, Name | tuple[Name, ...]] = {
    "router": "layers.{i}.mlp.gate",
    **expert_modules("mlp", "gate_proj", "up_proj", "down_proj"),
    **gated_modules("shared.", "layers.{i}.mlp.shared_experts"),
}
"""The names of a mixture's modules in the checkpoints of most families."""


def llama_names(modules: Modules | None = None, **others: Name | tuple[Name, ...]) -> Names:
    """The names of a family that has Llama's names except for `modules` and `others`."""
    return prefixed(("model.", ""), {**LLAMA_MODULES, **(modules or {}), **others}) | {"head": ("lm_head",)}


def gpt_names(**modules: str) -> Names:
    """The names of a family that has GPT-2's names except for `modules`."""
    ends = {"embed": "wte", "positions": "wpe", "final_norm": "ln_f"}
    norms = {"attention_in": "h.{i}.ln_1", "mlp_in": "h.{i}.ln_2"}
    return prefixed(("transformer.", ""), ends | norms | modules) | {"head": ("lm_head",)}


def rms(fields: Fields, field: str = "rms_norm_eps", **others: Any) -> NormSpec:
    """An RMS norm. `others`, here and below, are other fields of the spec."""
    return NormSpec("rms", fields.number(field), **others)


def layer_norm(fields: Fields, field: str, **others: Any) -> NormSpec:
    """A layer norm with a bias."""
    return NormSpec("layer", fields.number(field), **{"bias": True, **others})


def both_in(norm: NormSpec) -> LayerNorms:
    """The same norm before attention and before the MLP."""
    return LayerNorms(attention_in=norm, mlp_in=norm)


def attention(fields: Fields, **others: Any) -> AttentionSpec:
    """Attention with the numbers and the size of heads from the usual fields.

    num_key_value_heads defaults to num_attention_heads, and head_dim to hidden_size / num_attention_heads.
    """
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size_or("num_key_value_heads", heads)
    fields.multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim(fields), **others)


def head_dim(fields: Fields) -> int:
    """head_dim, or hidden_size / num_attention_heads where it is absent."""
    if fields.get("head_dim") is None:
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        fields.multiple("hidden_size", hidden, "num_attention_heads", heads)
        return hidden // heads
    size = fields.size("head_dim")
    fields.multiple("head_dim", size, "the size of a rotary pair", 2)
    return size


def mlp(fields: Fields, field: str = "hidden_act", **others: Any) -> MLPSpec:
    """An MLP of the width intermediate_size, with the activation in `field`."""
    return MLPSpec(size=fields.size("intermediate_size"), activation=fields.activation(field), **others)


def gated_mlp(fields: Fields, **others: Any) -> MLPSpec:
    """The same, gated."""
    return mlp(fields, gated=True, **others)


def router(
    fields: Fields, experts: str = "num_experts", top_k: str = "num_experts_per_tok", **others: Any
) -> RouterSpec:
    """A router whose numbers of experts are in the fields `experts` and `top_k`."""
    count, chosen = fields.size(experts), fields.size(top_k)
    if chosen > count:
        raise ModelError(f"{fields.name}: {top_k} = {chosen} exceeds {experts} = {count}")
    return RouterSpec(count, chosen, **others)


def grouped_router(fields: Fields, experts: str = "n_routed_experts") -> RouterSpec:
    """The router of DeepSeek V3 and GLM-4.5."""
    made = router(
        fields,
        experts,
        score="sigmoid",
        correction=True,
        groups=fields.size("n_group"),
        top_groups=fields.size("topk_group"),
        normalised=fields.flag("norm_topk_prob"),
        least_sum=1e-20,
        scale=fields.number("routed_scaling_factor"),
        wide=True,
    )
    each, rest = divmod(made.experts, made.groups)
    offered = made.experts if made.groups == 1 else made.top_groups * each
    if rest or (made.groups > 1 and each < 2) or made.top_groups > made.groups or offered < made.top_k:
        raise ModelError(
            f"{fields.name}: n_group = {made.groups} and topk_group = {made.top_groups} do not fit {made.experts} "
            f"experts: the chosen groups, equal and of at least two experts, must have {made.top_k} experts"
        )
    return made


def mixture(
    fields: Fields,
    router: RouterSpec,
    size: str = "moe_intermediate_size",
    activation: str = "hidden_act",
    **others: Any,
) -> MixtureSpec:
    """A mixture with experts of the width in the field `size`, with the activation in the field `activation`."""
    return MixtureSpec(router, fields.size(size), fields.activation(activation), **others)


def shared_experts(
    fields: Fields, number: int, size: str = "moe_intermediate_size", **others: Any
) -> MLPSpec | None:
    """The MLP for all tokens, which is as wide as `number` experts; None for 0."""
    if not number:
        return None
    return MLPSpec(number * fields.size(size), fields.activation(), gated=True, **others)


def gpt_mlp(fields: Fields) -> MLPSpec:
    """The MLP of GPT-2, with biases. Its width is n_inner, or four times the hidden size if that is absent."""
    size = fields.size_or("n_inner", 4 * fields.size("hidden_size"))
    return MLPSpec(size, fields.activation("activation_function"), bias=True)


def gemma_scales(fields: Fields) -> dict[str, Any]:
    """The fields of a model for Gemma's factor of the embeddings and cap of the logits."""
    scale = fields.size("hidden_size") ** 0.5
    return {"embed_scale": scale, "logit_cap": fields.cap("final_logit_softcapping")}


def gpt_rope(fields: Fields) -> RopeSpec:
    """The RoPE of GPT-J: the first rotary_dim values of each head, interleaved."""
    rotated, size = fields.size("rotary_dim"), head_dim(fields)
    fields.multiple("rotary_dim", rotated, "the size of a rotary pair", 2)
    if rotated > size:
        raise ModelError(f"{fields.name}: rotary_dim = {rotated} exceeds the {size} values of a head")
    spec = rope_spec({"rope_theta": 10_000.0}, rotated, fields.size("max_position_embeddings"))
    return replace(spec, interleaved=True)


def alike(fields: Fields, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """Equal layers, except for the windows of their attention."""
    return tuple(
        replace(layer, attention=replace(layer.attention, window=window)) for window in fields.windows()
    )


def model(
    fields: Fields,
    names: Names,
    layers: Sequence[LayerSpec],
    final_norm: NormSpec | None,
    **others: Any,
) -> ModelSpec:
    """A model with the usual fields for everything except its layers and its final norm."""
    hidden_size = fields.size("hidden_size")
    ropes = [layer.attention.rope for layer in layers if layer.attention.rope is not None]
    values = {"embed_size": hidden_size, "tied_head": fields.flag("tie_word_embeddings")}
    if "max_positions" not in others:
        values["max_positions"] = _context(fields.size("max_position_embeddings"), ropes)
    return ModelSpec(
        name=fields.name,
        family=fields.get("model_type").replace("-", "_"),
        names=names,
        dtype=fields.dtype(),
        layers=tuple(layers),
        hidden_size=hidden_size,
        vocab_size=fields.size("vocab_size"),
        bos_token_id=fields.token_id("bos_token_id"),
        pad_token_id=fields.token_id("pad_token_id"),
        eos_token_ids=fields.token_ids("eos_token_id"),
        final_norm=final_norm,
        **{**values, **others},
    )


def _context(stated: int, ropes: Sequence[RopeSpec]) -> int:
    """The context length with the scaling of the rotary positions.

    `stated` is the config's max_position_embeddings. In a config without original_max_position_embeddings it is the
    length before scaling; in others it is usually the length after scaling.
    """
    return max([stated, *(math.floor(rope.original_max_positions * rope.factor) for rope in ropes)])
