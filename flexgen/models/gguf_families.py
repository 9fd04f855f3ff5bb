"""The families of GGUF files: what their metadata are in a config, and what conversion has changed in the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.errors import CheckpointError, ModelError, shown
from flexgen.models.cached_specs import read_spec
from flexgen.models.families import config_from_dict
from flexgen.models.gguf_header import GGUFHeader, all_shards, read_headers
from flexgen.models.gguf_metadata import Metadata
from flexgen.models.mlp_spec import MixtureSpec
from flexgen.models.sources import Name, Names, Stacked
from flexgen.models.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

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
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", _WINDOW | _CAPS, others=_gemma2),
    "gemma3": Architecture("gemma3_text", _WINDOW | _CAPS, others=_gemma3),
    "glm4": Architecture("glm4", flags=_BIAS),
    "gpt-oss": Architecture("gpt_oss", _LOCAL | _WINDOW, flags=_BIAS, others=_gpt_oss),
    "granite": Architecture("granite", _GRANITE, flags=_LLAMA, in_pairs=True),
    "llama": Architecture("llama", flags=_LLAMA, in_pairs=True),
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

_MIXTRAL = Architecture("mixtral", _LOCAL, {"sliding_window": None}, in_pairs=True)
"""A llama with experts."""

_NO_EFFECT = ("vocab_size", "rope.scaling.finetuned")
"""Keys that are not needed: the embedding has the size of the vocabulary."""


def spec_from_gguf(header: GGUFHeader, name: str) -> ModelSpec:
    """The spec of a model in GGUF files. Raises ModelError and CheckpointError."""
    metadata = Metadata(header, name)
    known = _architecture(metadata)
    values = _config(metadata, known)
    metadata.check_all_read()
    spec, _ = read_spec(values, name)
    return _converted(spec, known, metadata)


def config_from_gguf(path: Path) -> PreTrainedConfig:
    """The transformers config of the model in a GGUF file. Raises ModelError and CheckpointError."""
    metadata = Metadata(read_headers(all_shards(path)), str(path))
    return config_from_dict(_config(metadata, _architecture(metadata)), metadata.name)


def _architecture(metadata: Metadata) -> Architecture:
    known = ARCHITECTURES.get(str(metadata.architecture))
    if known is None:
        raise ModelError(
            f"{metadata.name}: general.architecture = {shown(metadata.architecture)} is not supported for GGUF files"
            f"; supported: {', '.join(ARCHITECTURES)}. If docs/models.md lists the model, use it in safetensors"
        )
    return _MIXTRAL if known.family == "llama" and metadata.get("expert_count") else known


def _config(metadata: Metadata, known: Architecture) -> Values:
    """The contents of a config.json with what the metadata say."""
    for key in _NO_EFFECT:
        metadata.get(key)
    hidden, heads = metadata.size("embedding_length"), metadata.size("attention.head_count")
    head_dim = metadata.size("attention.key_length", max(hidden // heads, 1))
    if metadata.size("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{metadata.name}: keys and values of different sizes are not supported")
    embed = metadata.header.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(f"{metadata.name}: token_embd.weight is missing or not a matrix")
    eps, eps_field = known.eps
    values: Values = {
        "model_type": known.family,
        "dtype": _dtype(metadata.header),
        "vocab_size": embed.shape[0],
        "hidden_size": hidden,
        "head_dim": head_dim,
        "num_hidden_layers": metadata.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "intermediate_size": metadata.size("feed_forward_length"),
        "max_position_embeddings": metadata.size("context_length"),
        eps_field: metadata.needed(eps),
        "tie_word_embeddings": not metadata.has("output.weight"),
        **_token_ids(metadata.header.values),
        **known.fixed,
        **{flag: metadata.has(tensor) for flag, tensor in known.flags.items()},
    }
    for key, name in known.fields.items():
        if (value := metadata.get(key)) is not None:
            values[name] = value
    values["rope_parameters"] = _rope(metadata, values)
    return values | known.others(metadata, values)


def _token_ids(values: Mapping[str, Any]) -> Values:
    """Special ids. A file can have several that end a text: those of the text, of a turn and of a message."""
    ids = {
        name: values.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "padding", "eos", "eot", "eom")
    }
    ends = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None)
    return {
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["padding"],
        "eos_token_id": list(ends) or None,
    }


def _rope(metadata: Metadata, values: Values) -> Values:
    """The rope_parameters of a config."""
    theta, head_dim = metadata.get("rope.freq_base", 1e4), values["head_dim"]
    made: Values = {"rope_type": "default", "rope_theta": theta}
    rotated = metadata.size("rope.dimension_count", head_dim)
    if rotated != head_dim:
        share = rotated / head_dim
        # Rounding must not lose a value: families multiply the share by the size of a head.
        made["partial_rotary_factor"] = (
            share if int(head_dim * share) == rotated else math.nextafter(share, 1)
        )
    kind, factor = metadata.get("rope.scaling.type"), metadata.get("rope.scaling.factor")
    if kind == "linear" or (kind is None and factor not in (None, 0, 1)):
        made |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        made |= {"rope_type": "yarn", "factor": factor}
        names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        names |= {"original_context_length": "original_max_position_embeddings"}
        for key, name in names.items():
            if (value := metadata.get(f"rope.scaling.{key}")) is not None:
                made[name] = value
    elif kind not in (None, "none", "longrope"):
        raise ModelError(
            f"{metadata.name}: rope.scaling.type = {shown(kind)} is not supported; supported: none, linear, yarn, "
            "longrope"
        )
    return made


def _dtype(header: GGUFHeader) -> str:
    """The dtype of most bytes of the weights; bfloat16 if they are quantized."""
    nbytes: Counter[str] = Counter()
    for stored in header.tensors.values():
        nbytes["bfloat16" if stored.dtype is None else str(stored.dtype).removeprefix("torch.")] += (
            stored.nbytes
        )
    return nbytes.most_common(1)[0][0] if nbytes else "float32"


def _converted(spec: ModelSpec, known: Architecture, metadata: Metadata) -> ModelSpec:
    """The spec of the weights as conversion to GGUF has changed them.

    Numbers that a norm adds to its weights are added already, no matrix is transposed, and the rows of gates are not
    mixed with others.
    """
    name = "rope_freqs.weight"
    factors = metadata.floats(name) if metadata.has(name) else None

    def rope(given: RopeSpec | None) -> RopeSpec | None:
        if given is None:
            return None
        if factors is not None:
            if len(factors) != len(given.inv_freq):
                raise CheckpointError(
                    f"{spec.name}: {name} has {len(factors)} values for {len(given.inv_freq)} pairs"
                )
            pairs = zip(given.inv_freq, factors, strict=True)
            given = replace(given, inv_freq=tuple(each / factor for each, factor in pairs))
        return replace(given, interleaved=given.interleaved or known.in_pairs)

    def norm(given: NormSpec | None) -> NormSpec | None:
        return None if given is None else replace(given, plus=0.0)

    def layer(given: LayerSpec) -> LayerSpec:
        own, norms, mlp = given.attention, given.norms, given.mlp
        qk_norm = own.qk_norm and replace(own.qk_norm, norm=replace(own.qk_norm.norm, plus=0.0))
        return replace(
            given,
            attention=replace(own, qk_norm=qk_norm, rope=rope(own.rope)),
            mlp=replace(mlp, first="separate") if isinstance(mlp, MixtureSpec) else mlp,
            norms=replace(norms, **{name: norm(each) for name, each in vars(norms).items()}),
        )

    # Layers that share a spec continue to share one.
    made = {id(each): layer(each) for each in spec.layers}
    return replace(
        spec,
        names=NAMES,
        layers=tuple(made[id(each)] for each in spec.layers),
        final_norm=norm(spec.final_norm),
        embed_norm=norm(spec.embed_norm),
        transposed=frozenset(),
    )
