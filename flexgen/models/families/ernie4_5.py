"""ERNIE 4.5, dense: Llama with interleaved rotary positions."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of an ERNIE 4.5 config."""
    bias, norm = fields.flag("use_bias"), rms(fields)
    rope = fields.rope(head_dim(fields), interleaved=True)
    layer = LayerSpec(
        attention(fields, qkv_bias=bias, out_bias=bias, rope=rope),
        gated_mlp(fields, bias=bias),
        both_in(norm),
    )
    return model(fields, llama_names(), [layer] * fields.size("num_hidden_layers"), norm)
