"""StableLM 3B, Zephyr and StableLM 2."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.spec import LayerNorms, LayerSpec, ModelSpec, QKNormSpec
from flexgen.models.tables import attention, both_in, gated_mlp, head_dim, layer_norm, llama_names, model

NAMES = llama_names(
    q_norm="layers.{i}.self_attn.q_layernorm.norms.{h}", k_norm="layers.{i}.self_attn.k_layernorm.norms.{h}"
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a StableLM config."""
    norm, parallel = layer_norm(fields, "layer_norm_eps"), fields.flag("use_parallel_residual")
    heads_norm = QKNormSpec(layer_norm(fields, "layer_norm_eps", bias=False), over="each")
    layer = LayerSpec(
        attention(
            fields,
            qkv_bias=fields.flag("use_qkv_bias"),
            qk_norm=heads_norm if fields.flag("qk_layernorm") else None,
            rope=fields.rope(head_dim(fields), partial=True),
        ),
        gated_mlp(fields),
        LayerNorms(attention_in=norm) if parallel else both_in(norm),
        residual="parallel" if parallel else "serial",
    )
    return model(fields, NAMES, [layer] * fields.size("num_hidden_layers"), norm)
