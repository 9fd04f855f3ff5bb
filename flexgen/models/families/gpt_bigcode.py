"""SantaCoder and StarCoder: GPT-2 with one key and value head."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gpt_mlp, gpt_names, layer_norm, model

NAMES = gpt_names(
    qkv="h.{i}.attn.c_attn", out="h.{i}.attn.c_proj", up="h.{i}.mlp.c_fc", down="h.{i}.mlp.c_proj"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GPTBigCode config."""
    norm, form = layer_norm(fields, "layer_norm_epsilon"), "rows" if fields.flag("multi_query") else "heads"
    fields.one_of("scale_attn_weights", (True,))
    # The softmax is always in float32. The others are of a way to run the model that transformers no longer has.
    fields.skip("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    fields.skip("inference_runner", "pad_key_length", "validate_runner_input")
    layer = LayerSpec(
        attention(fields, qkv=form, qkv_bias=True, out_bias=True), gpt_mlp(fields), both_in(norm)
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm, positions="learned")
