"""OPT, and what was built on its shape: OPT-IML and Galactica."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexgen.models import fields
from flexgen.models.spec import AttentionSpec, LayerNorms, LayerSpec, MLPSpec, ModelSpec, NormSpec, prefixed

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import OPTConfig

NAMES = prefixed(
    ("model.decoder.", "decoder."),
    {
        "embed": "embed_tokens",
        "positions": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "attention_in": "layers.{i}.self_attn_layer_norm",
        "attention_out": "layers.{i}.self_attn_layer_norm",
        "q": "layers.{i}.self_attn.q_proj",
        "k": "layers.{i}.self_attn.k_proj",
        "v": "layers.{i}.self_attn.v_proj",
        "out": "layers.{i}.self_attn.out_proj",
        "mlp_in": "layers.{i}.final_layer_norm",
        "mlp_out": "layers.{i}.final_layer_norm",
        "up": "layers.{i}.fc1",
        "down": "layers.{i}.fc2",
        "final_norm": "final_layer_norm",
    },
) | {"head": ("lm_head",)}

# (layers, heads, hidden size): table 1 of "OPT: Open Pre-trained Transformer Language Models".
SIZES = {
    "opt-125m": (12, 12, 768),
    "opt-350m": (24, 16, 1024),
    "opt-1.3b": (24, 32, 2048),
    "opt-2.7b": (32, 32, 2560),
    "opt-6.7b": (32, 32, 4096),
    "opt-13b": (40, 40, 5120),
    "opt-30b": (48, 56, 7168),
    "opt-66b": (64, 72, 9216),
    "opt-175b": (96, 96, 12288),
}


def known_size(model: str) -> str | None:
    """The key in `SIZES` of "opt-30b", "facebook/opt-30b" or "OPT-30B"; None for any other text."""
    size = model.lower().removeprefix("facebook/")
    return size if size in SIZES else None


def known_config(size: str) -> OPTConfig:
    """The configuration of a key of `SIZES`, made without a network."""
    from transformers import OPTConfig  # takes seconds, and a model on disk has a config of its own

    num_layers, num_heads, hidden_size = SIZES[size]
    small = size == "opt-350m"
    return OPTConfig(
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        hidden_size=hidden_size,
        ffn_dim=4 * hidden_size,
        word_embed_proj_dim=512 if small else hidden_size,
        do_layer_norm_before=not small,
        dtype="float16",
    )


def to_spec(config: OPTConfig, name: str) -> ModelSpec:
    """The spec of an OPT config. Raises ModelError for what the layers do not compute."""
    fields.check_neutral(config, name)
    hidden_size, num_heads = (fields.size(config, name, f) for f in ("hidden_size", "num_attention_heads"))
    fields.multiple(name, "hidden_size", hidden_size, "num_attention_heads", num_heads)
    vocab_size = fields.size(config, name, "vocab_size")
    pre_norm = fields.flag(config, name, "do_layer_norm_before")
    bias = fields.flag(config, name, "enable_bias")
    affine = fields.flag(config, name, "layer_norm_elementwise_affine")
    norm = NormSpec("layer", 1e-5, weight=affine, bias=affine)
    layer = LayerSpec(
        attention=AttentionSpec(
            heads=num_heads,
            kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=MLPSpec(
            size=fields.size(config, name, "ffn_dim"),
            activation=fields.activation(config, name, "activation_function"),
            bias=bias,
        ),
        norms=LayerNorms(attention_in=norm, mlp_in=norm)
        if pre_norm
        else LayerNorms(attention_out=norm, mlp_out=norm),
        residual="serial" if pre_norm else "post",
    )
    return ModelSpec(
        name=name,
        family="opt",
        names=NAMES,
        dtype=fields.dtype_of(config, name),
        layers=(layer,) * fields.size(config, name, "num_hidden_layers"),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_positions=fields.size(config, name, "max_position_embeddings"),
        embed_size=fields.size(config, name, "word_embed_proj_dim"),
        bos_token_id=fields.token_id(config, name, "bos_token_id"),
        pad_token_id=fields.token_id(config, name, "pad_token_id"),
        eos_token_ids=fields.token_ids(config.eos_token_id, name, "eos_token_id", vocab_size),
        # The config's own field, with its underscore: checkpoints tuned before transformers 4.20.1 have none.
        final_norm=norm if pre_norm and not fields.flag(config, name, "_remove_final_layer_norm") else None,
        tied_head=fields.flag(config, name, "tie_word_embeddings"),
        positions="learned",
        position_offset=2,
    )
