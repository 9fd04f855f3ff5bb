"""Llama 1, 2 and 3, and the checkpoints of other houses that carry its model_type."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flexgen.errors import ModelError
from flexgen.models.families import fields
from flexgen.models.spec import ModelSpec, NameTable, RopeSpec
from flexgen.shown import shown

CONFIG_CLASS = LlamaConfig

NAMES = NameTable(
    prefixes=("model.", ""),
    embed="embed_tokens",
    attention_norm="layers.{i}.input_layernorm",
    q="layers.{i}.self_attn.q_proj",
    k="layers.{i}.self_attn.k_proj",
    v="layers.{i}.self_attn.v_proj",
    out="layers.{i}.self_attn.o_proj",
    mlp_norm="layers.{i}.post_attention_layernorm",
    gate="layers.{i}.mlp.gate_proj",
    up="layers.{i}.mlp.up_proj",
    down="layers.{i}.mlp.down_proj",
    final_norm="norm",
    head="lm_head",
)

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def to_spec(config: LlamaConfig, name: str) -> ModelSpec:
    """The spec of a Llama config. Raises ModelError for what the layers do not compute."""
    fields.check_neutral(config, name)
    hidden_size, head_dim = (fields.size(config, name, f) for f in ("hidden_size", "head_dim"))
    num_heads, num_kv_heads = (
        fields.size(config, name, f) for f in ("num_attention_heads", "num_key_value_heads")
    )
    fields.multiple(name, "num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
    fields.multiple(name, "head_dim", head_dim, "the two of a rotating pair", 2)
    rope = _rope(config, name, head_dim)
    vocab_size = fields.size(config, name, "vocab_size")
    return ModelSpec(
        name=name,
        family="llama",
        names=NAMES,
        dtype=fields.dtype_of(config, name),
        hidden_size=hidden_size,
        num_layers=fields.size(config, name, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=fields.size(config, name, "intermediate_size"),
        vocab_size=vocab_size,
        max_positions=_context(fields.size(config, name, "max_position_embeddings"), rope),
        embed_size=hidden_size,
        bos_token_id=fields.token_id(config, name, "bos_token_id"),
        pad_token_id=fields.token_id(config, name, "pad_token_id"),
        eos_token_ids=fields.token_ids(config.eos_token_id, name, "eos_token_id", vocab_size),
        norm="rmsnorm",
        norm_eps=fields.number(config, name, "rms_norm_eps"),
        norm_affine=True,
        pre_norm=True,
        final_norm=True,
        activation=fields.activation(config, name, "hidden_act"),
        gated_mlp=True,
        qkv_bias=fields.flag(config, name, "attention_bias"),
        out_bias=fields.flag(config, name, "attention_bias"),
        mlp_bias=fields.flag(config, name, "mlp_bias"),
        head_bias=False,
        tied_head=fields.flag(config, name, "tie_word_embeddings"),
        positions="rope",
        rope=rope,
    )


def _context(stated: int, rope: RopeSpec) -> int:
    """Positions of the context that the scaling gives.

    `stated` is the config's max_position_embeddings. It is the length before scaling in a config that has no
    original_max_position_embeddings; in others it usually is the length after scaling.
    """
    return max(stated, math.floor(rope.original_max_positions * rope.factor))


def _rope(config: LlamaConfig, name: str, head_dim: int) -> RopeSpec:
    """Frequencies from transformers' own functions, so that they are equal to the last bit."""
    # The functions below complete the parameters in place; the caller's config stays as it is.
    config = copy.deepcopy(config)
    given = config.rope_parameters or {}
    if not isinstance(given, dict):
        raise ModelError(f"{name}: rope_parameters = {shown(given)} is not supported; expected an object")
    parameters: dict[str, Any] = dict(given)
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ModelError(
            f"{name}: rope_type = {shown(kind)} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        part = parameters["partial_rotary_factor"]
        raise ModelError(f"{name}: partial_rotary_factor = {shown(part)} is not supported; supported: 1.0")
    init = (
        LlamaRotaryEmbedding.compute_default_rope_parameters
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind]
    )
    long: torch.Tensor | None = None
    try:
        inv_freq, scaling = init(config)
        # Complete now, and a length stated outside of them has come in.
        parameters = dict(config.rope_parameters)
        stated = parameters.get("original_max_position_embeddings")
        # transformers stretches `dynamic` from max_position_embeddings, whatever else is stated.
        original = int(config.max_position_embeddings if stated is None or kind == "dynamic" else stated)
        if kind == "longrope":
            for field in ("short_factor", "long_factor"):
                if len(parameters[field]) != head_dim // 2:  # torch would spread a single one
                    raise ValueError(f"{field} must have head_dim / 2 = {head_dim // 2} factors")
            long, _ = init(config, seq_len=original + 1)
        factor = parameters.get("factor")
        if factor is None:
            factor = 1.0 if kind == "default" else config.max_position_embeddings / original
        factor = float(factor)
        theta, scaling = float(parameters["rope_theta"]), float(scaling)
        finite = all(map(math.isfinite, (theta, scaling, factor * original))) and all(
            values is None or bool(values.isfinite().all()) for values in (inv_freq, long)
        )
        if original < 1 or factor <= 0 or not finite:
            raise ValueError("lengths, factors and frequencies must be finite and positive")
        if kind == "dynamic" and head_dim < 4:
            raise ValueError(f"dynamic scaling needs a head_dim of at least 4, not {head_dim}")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"{name}: rope_parameters = {shown(parameters)} cannot be used: {shown(error)}"
        ) from error
    if len(inv_freq) != head_dim // 2:
        raise ModelError(
            f"{name}: rope_parameters give {len(inv_freq)} frequencies; "
            f"head_dim = {head_dim} needs {head_dim // 2}"
        )
    return RopeSpec(
        kind=kind,
        inv_freq=tuple(inv_freq.tolist()),
        scaling=scaling,
        theta=theta,
        factor=factor,
        original_max_positions=original,
        long_inv_freq=() if long is None else tuple(long.tolist()),
    )
