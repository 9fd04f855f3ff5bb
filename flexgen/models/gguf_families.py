"""Specs of models in GGUF files: the metadata as a config, and what conversion has changed in the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.errors import CheckpointError, ModelError, shown
from flexgen.models.cached_specs import read_spec
from flexgen.models.families import config_from_dict
from flexgen.models.gguf_architectures import ARCHITECTURES, MIXTRAL, NAMES, Architecture, Values
from flexgen.models.gguf_header import GGUFHeader, all_shards, read_headers
from flexgen.models.gguf_metadata import Metadata
from flexgen.models.mlp_spec import MixtureSpec
from flexgen.models.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

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
    return MIXTRAL if known.family == "llama" and metadata.get("expert_count") else known


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
            mlp=_separate(mlp) if isinstance(mlp, MixtureSpec) else mlp,
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


def _separate(mixture: MixtureSpec) -> MixtureSpec:
    """The mixture with two matrices for the inner width of each expert and of the shared MLP."""
    shared = mixture.shared and replace(mixture.shared, fused=False)
    return replace(mixture, first="separate", shared=shared)
