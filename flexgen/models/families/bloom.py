"""BLOOM: ALiBi, and a norm of the embeddings."""

from __future__ import annotations

from flexgen.kernels.scoring import alibi_slopes
from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import prefixed
from flexgen.models.spec import LayerSpec, ModelSpec, ScoreSpec
from flexgen.models.tables import attention, both_in, layer_norm, model

NAMES = prefixed(
    ("transformer.", ""),
    {
        "embed": "word_embeddings",
        "embed_norm": "word_embeddings_layernorm",
        "attention_in": "h.{i}.input_layernorm",
        "qkv": "h.{i}.self_attention.query_key_value",
        "out": "h.{i}.self_attention.dense",
        "mlp_in": "h.{i}.post_attention_layernorm",
        "up": "h.{i}.mlp.dense_h_to_4h",
        "down": "h.{i}.mlp.dense_4h_to_h",
        "final_norm": "ln_f",
    },
) | {"head": ("lm_head",)}

_OF_TRAINING = (
    "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "offset_alibi",
    "skip_bias_add", "skip_bias_add_qkv", "unk_token_id",
)  # fmt: skip
"""Fields of published configs that the training program used. The softmax is always in float32."""

_CONTEXT = 2048
"""The length of the texts that the published models were trained with."""


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a BLOOM config."""
    norm, hidden = layer_norm(fields, "layer_norm_epsilon"), fields.size("hidden_size")
    slopes = alibi_slopes(fields.size("num_attention_heads"))
    layer = LayerSpec(
        attention(fields, qkv="heads", qkv_bias=True, out_bias=True, scores=ScoreSpec(alibi=slopes)),
        MLPSpec(4 * hidden, "gelu_pytorch_tanh", bias=True),
        both_in(norm),
    )
    fields.skip(*_OF_TRAINING)
    layers = [layer] * fields.size("num_hidden_layers")
    context = fields.size_or("seq_length", _CONTEXT)
    return model(fields, NAMES, layers, norm, max_positions=context, embed_norm=norm)
