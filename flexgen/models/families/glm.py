"""GLM-4 9B in the layout of transformers (`-hf`)."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerSpec, ModelSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, llama_names, model, rms


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a GLM config."""
    norm, rope = rms(fields), fields.rope(head_dim(fields), partial=True, interleaved=True)
    layer = LayerSpec(
        attention(fields, qkv_bias=fields.flag("attention_bias"), rope=rope),
        gated_mlp(fields, fused=True),
        both_in(norm),
    )
    return model(fields, llama_names(), [layer] * fields.size("num_hidden_layers"), norm)
