"""OPT in all sizes, OPT-IML and Galactica."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import prefixed
from flexgen.models.spec import AttentionSpec, LayerNorms, LayerSpec, ModelSpec, NormSpec
from flexgen.models.tables import both_in, model

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


def known_config(size: str) -> OPTConfig:
    """The config for a key of `SIZES`, created without network access."""
    from transformers import OPTConfig  # takes seconds to import, and a model on disk has its own config

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


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an OPT config."""
    hidden_size, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    fields.multiple("hidden_size", hidden_size, "num_attention_heads", heads)
    pre_norm, bias = fields.flag("do_layer_norm_before"), fields.flag("enable_bias")
    affine = fields.flag("layer_norm_elementwise_affine")
    norm = NormSpec("layer", 1e-5, weight=affine, bias=affine)
    layer = LayerSpec(
        AttentionSpec(heads, heads, hidden_size // heads, qkv_bias=bias, out_bias=bias),
        MLPSpec(fields.size("ffn_dim"), fields.activation("activation_function"), bias=bias),
        both_in(norm) if pre_norm else LayerNorms(attention_out=norm, mlp_out=norm),
        residual="serial" if pre_norm else "post",
    )
    fields.one_of("learned_embeddings", (None, True))
    # A private field of the config: checkpoints fine-tuned before transformers 4.20.1 have no final norm.
    removed = fields.flag("_remove_final_layer_norm")
    return model(
        fields,
        NAMES,
        [layer] * fields.size("num_hidden_layers"),
        final_norm=norm if pre_norm and not removed else None,
        embed_size=fields.size("word_embed_proj_dim"),
        positions="learned",
        position_offset=2,
    )
