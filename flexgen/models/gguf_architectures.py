"""The architectures of llama.cpp: names of tensors, and the config's fields by the keys of the metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen.errors import ModelError, shown
from flexgen.models.gguf_metadata import Metadata
from flexgen.models.sources import Name, Names, Stacked

_LAYER = "blk.{i}."


def _experts(module: str) -> tuple[Name, ...]:
    """A tensor for all experts, or in files from before 2024 one for each."""
    return Stacked(f"{_LAYER}ffn_{module}_exps.weight"), f"{_LAYER}ffn_{module}.{{e}}"


NAMES: Names = {
    "embed": ("token_embd",),
    "final_norm": ("output_norm",),
    "head": ("output",),
    "attention_in": (f"{_LAYER}attn_norm",),
    "attention_out": (f"{_LAYER}post_attention_norm",),
    "q": (f"{_LAYER}attn_q",),
    "k": (f"{_LAYER}attn_k",),
    "v": (f"{_LAYER}attn_v",),
    "qkv": (f"{_LAYER}attn_qkv",),
    "q_norm": (f"{_LAYER}attn_q_norm",),
    "k_norm": (f"{_LAYER}attn_k_norm",),
    "sinks": (f"{_LAYER}attn_sinks.weight",),
    "out": (f"{_LAYER}attn_output",),
    # gpt-oss and Seed-OSS have the second name.
    "mlp_in": (f"{_LAYER}ffn_norm", f"{_LAYER}post_attention_norm"),
    "mlp_out": (f"{_LAYER}post_ffw_norm",),
    "gate": (f"{_LAYER}ffn_gate",),
    "up": (f"{_LAYER}ffn_up",),
    "gate_up": (f"{_LAYER}ffn_up",),
    "down": (f"{_LAYER}ffn_down",),
    "router": (f"{_LAYER}ffn_gate_inp",),
    "correction": (f"{_LAYER}exp_probs_b.bias",),
    **{f"shared.{module}": (f"{_LAYER}ffn_{module}_shexp",) for module in ("gate", "up", "down")},
    **{f"experts.{module}": _experts(module) for module in ("gate", "up", "down")},
    **{
        f"experts.{module}_bias": (Stacked(f"{_LAYER}ffn_{module}_exps.bias"),)
        for module in ("gate", "up", "down")
    },
}
"""The names of modules in GGUF files, which are the same for all families."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How the files of an architecture of llama.cpp describe a model.

    fields: the config's fields by further keys of the metadata. fixed: fields with the same value in all models.
    flags: a field that tells whether a tensor exists, and this tensor. others: makes fields from several keys.
    """

    family: str
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    others: Callable[[Metadata, Values], Values] = lambda metadata, values: {}
    eps: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    in_pairs: bool = False
    """Whether the rows of queries and keys were reordered, so that the two values of a rotary pair are neighbours."""


_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_LLAMA = _BIAS | {"mlp_bias": "blk.0.ffn_gate.bias"}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_NARROW = _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"}
_GLM_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_LOGITS = {"logit_scale": "logit_scale"}
_LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")


def _gemma_scale(metadata: Metadata, values: Values, wide: int) -> Values:
    """The scale of scores, which llama.cpp also knows only by the number of layers: that of the 27B is `wide`."""
    heads = values["num_attention_heads"]
    per_head = values["hidden_size"] // heads
    is_wide = values["num_hidden_layers"] == wide
    return {"query_pre_attn_scalar": per_head if is_wide else values["head_dim"]}


def _gemma2(metadata: Metadata, values: Values) -> Values:
    return _gemma_scale(metadata, values, wide=46)


def _gemma3(metadata: Metadata, values: Values) -> Values:
    """Layers with a window have a RoPE of their own. Every sixth layer has none."""
    count, period = values["num_hidden_layers"], metadata.get("attention.sliding_window_pattern", 6)
    if period != 6:
        raise ModelError(
            f"{metadata.name}: attention.sliding_window_pattern = {shown(period)} is not supported; supported: 6"
        )
    own = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 1e4)}
    kinds = ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(count)]
    ropes = {"full_attention": values["rope_parameters"], "sliding_attention": own}
    return _gemma_scale(metadata, values, wide=62) | {"layer_types": kinds, "rope_parameters": ropes}


def _sigmoid(metadata: Metadata, values: Values) -> Values:
    """Scores of a router are sigmoids, also if the file does not tell."""
    key, sigmoid = "expert_gating_func", 2
    if (score := metadata.get(key, sigmoid)) != sigmoid:
        raise ModelError(
            f"{metadata.name}: {key} = {shown(score)} is not supported; supported: {sigmoid} (sigmoid)"
        )
    return {}


def _glm4moe(metadata: Metadata, values: Values) -> Values:
    """The last blocks predict further tokens, and are not used."""
    unused = metadata.size("nextn_predict_layers", 0) if metadata.get("nextn_predict_layers") else 0
    return _sigmoid(metadata, values) | {"num_hidden_layers": values["num_hidden_layers"] - unused}


def _gpt_oss(metadata: Metadata, values: Values) -> Values:
    size = {"intermediate_size": metadata.size("expert_feed_forward_length")}
    return size | {"rope_parameters": values["rope_parameters"] | {"truncate": False}}


def _phi3(metadata: Metadata, values: Values) -> Values:
    """A window as long as the context, or 0, is none. LongRoPE has its factors in tensors."""
    longest, key = values["max_position_embeddings"], "attention.sliding_window"
    window = metadata.size(key, longest) if metadata.get(key) else longest
    made: Values = {"sliding_window": window if window < longest else None}
    factors = [f"rope_factors_{which}.weight" for which in ("short", "long")]
    attention_factor = metadata.get("rope.scaling.attn_factor")
    original = metadata.size("rope.scaling.original_context_length", longest)
    if all(map(metadata.has, factors)):
        short, long = (metadata.floats(name) for name in factors)
        made["rope_parameters"] = values["rope_parameters"] | {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention_factor,
            "original_max_position_embeddings": original,
        }
        made["original_max_position_embeddings"] = original
    return made


ARCHITECTURES: dict[str, Architecture] = {
    "arcee": Architecture("arcee", flags=_BIAS, in_pairs=True),
    "cohere2": Architecture("cohere2", _LOGITS | _WINDOW, flags=_BIAS, eps=_LAYER_NORM),
    "command-r": Architecture(
        "cohere", _LOGITS, flags=_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"}, eps=_LAYER_NORM
    ),
    "ernie4_5": Architecture("ernie4_5", flags={"use_bias": "blk.0.attn_q.bias"}),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", _WINDOW | _CAPS, others=_gemma2),
    "gemma3": Architecture("gemma3_text", _WINDOW | _CAPS, others=_gemma3),
    "glm4": Architecture("glm4", flags=_BIAS),
    "glm4moe": Architecture(
        "glm4_moe",
        _GLM_EXPERTS,
        flags=_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
        others=_glm4moe,
    ),
    "gpt-oss": Architecture("gpt_oss", _LOCAL | _WINDOW, flags=_BIAS, others=_gpt_oss),
    "granite": Architecture("granite", _GRANITE, flags=_LLAMA, in_pairs=True),
    "granitemoe": Architecture(
        "granitemoeshared",
        _GRANITE | _LOCAL | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
        flags=_BIAS,
        in_pairs=True,
    ),
    "llama": Architecture("llama", flags=_LLAMA, in_pairs=True),
    "minimax-m2": Architecture(
        "minimax_m2", _LOCAL | {"expert_feed_forward_length": "intermediate_size"}, others=_sigmoid
    ),
    "olmo2": Architecture("olmo2", flags=_BIAS),
    "olmoe": Architecture("olmoe", _EXPERTS, {"norm_topk_prob": False}),
    "phi3": Architecture("phi3", others=_phi3),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", flags=_BIAS),
    "qwen3moe": Architecture("qwen3_moe", _NARROW, {"norm_topk_prob": True}, flags=_BIAS),
    "seed_oss": Architecture("seed_oss", flags=_BIAS | {"attention_out_bias": "blk.0.attn_output.bias"}),
    "smollm3": Architecture("smollm3", flags=_BIAS, in_pairs=True),
}
"""The architectures of llama.cpp that flexgen reads, by their names in files."""

MIXTRAL = Architecture("mixtral", _LOCAL, {"sliding_window": None}, in_pairs=True)
"""A llama with experts."""
