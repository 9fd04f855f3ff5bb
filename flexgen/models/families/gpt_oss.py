"""gpt-oss 20b and 120b, in MXFP4 or bfloat16: attention sinks, windows in every other layer, and clamped experts."""

from __future__ import annotations

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import ClampedGLU
from flexgen.models.sources import Stacked
from flexgen.models.spec import LayerSpec, ModelSpec, ScoreSpec
from flexgen.models.tables import attention, both_in, head_dim, llama_names, mixture, model, rms, router

_EXPERTS = "layers.{i}.mlp.experts"
NAMES = llama_names(
    {
        "sinks": "layers.{i}.self_attn.sinks",
        "router": "layers.{i}.mlp.router",
        "experts.gate_up": Stacked(f"{_EXPERTS}.gate_up_proj"),
        "experts.gate_up_bias": Stacked(f"{_EXPERTS}.gate_up_proj_bias"),
        "experts.down": Stacked(f"{_EXPERTS}.down_proj"),
        "experts.down_bias": Stacked(f"{_EXPERTS}.down_proj_bias"),
    }
)


def to_spec(fields: Fields) -> ModelSpec:
    """The spec of a gpt-oss config."""
    bias, norm = fields.flag("attention_bias"), rms(fields, cast="after")
    rope = fields.rope(head_dim(fields))
    experts = mixture(
        fields,
        router(fields, "num_local_experts", bias=True, scored="chosen"),
        "intermediate_size",
        clamped=ClampedGLU(fields.number("swiglu_alpha"), fields.positive("swiglu_limit")),
        first="interleaved",
        bias=True,
    )
    layers = [
        LayerSpec(
            attention(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                rope=rope,
                scores=ScoreSpec(sinks=True),
                window=window,
            ),
            experts,
            both_in(norm),
        )
        for window in fields.windows()
    ]
    transposed = frozenset({"experts.gate_up", "experts.down"})
    return model(fields, NAMES, layers, norm, transposed=transposed)
