"""A family whose layers all differ: heads, head sizes, MLPs, norms and RoPE are given layer by layer.

It is a family like those of flexgen/models/families, found by its file. It computes nothing of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from flexgen.models.fields import Fields
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.sources import prefixed
from flexgen.models.spec import (
    AttentionSpec,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

NAMES = prefixed(
    ("model.", ""),
    {
        "embed": "embed",
        "final_norm": "norm",
        **{name: f"layers.{{i}}.{name}" for name in ("q", "k", "v", "out", "gate", "up", "down")},
        **dict.fromkeys(("attention_in", "attention_out"), "layers.{i}.attention_norm"),
        **dict.fromkeys(("mlp_in", "mlp_out"), "layers.{i}.mlp_norm"),
    },
) | {"head": ("lm_head",)}

RMS, LAYER_NORM = NormSpec("rms", 1e-5), NormSpec("layer", 1e-5, bias=True)


def rope(head_dim: int, theta: float, scaling: float = 1.0) -> RopeSpec:
    pairs = range(0, head_dim, 2)
    return RopeSpec("default", tuple(theta ** (-pair / head_dim) for pair in pairs), scaling, theta)


WIDE = LayerSpec(
    AttentionSpec(heads=4, kv_heads=2, head_dim=16, rope=rope(16, 10_000.0)),
    MLPSpec(size=48, activation="silu", gated=True),
    LayerNorms(attention_in=RMS, mlp_in=RMS),
)
NARROW = LayerSpec(
    AttentionSpec(heads=2, kv_heads=1, head_dim=4, qkv_bias=True, rope=rope(4, 100.0, scaling=0.9)),
    MLPSpec(size=160, activation="gelu", bias=True),
    LayerNorms(attention_in=LAYER_NORM, mlp_in=RMS),
)
POST_NORM = LayerSpec(
    AttentionSpec(heads=8, kv_heads=8, head_dim=4, out_bias=True),  # no rope
    MLPSpec(size=16, activation="relu"),
    LayerNorms(attention_out=NormSpec("layer", 1e-5, weight=False), mlp_out=LAYER_NORM),
    residual="post",
)
OTHER_ROPE = replace(WIDE, attention=replace(WIDE.attention, rope=rope(16, 500_000.0)))
"""Unlike `WIDE` in nothing that a shape shows."""

KINDS = {"wide": WIDE, "narrow": NARROW, "post-norm": POST_NORM, "other rope": OTHER_ROPE}


class UnevenConfig(PreTrainedConfig):
    """`kinds`: the names of the layers, in their order."""

    model_type = "uneven"

    def __init__(self, kinds: tuple[str, ...] = ("wide", "narrow"), vocab_size: int = 64, **fields) -> None:
        self.kinds = list(kinds)
        self.vocab_size = vocab_size
        super().__init__(**fields)


def to_spec(fields: Fields) -> ModelSpec:
    return ModelSpec(
        name=fields.name,
        family="uneven",
        names=NAMES,
        dtype=fields.dtype(),
        layers=tuple(KINDS[kind] for kind in fields.get("kinds")),
        hidden_size=32,
        vocab_size=fields.size("vocab_size"),
        max_positions=4096,
        embed_size=32,
        bos_token_id=None,
        pad_token_id=1,
        eos_token_ids=(),
        final_norm=RMS,
        tied_head=False,
    )


def logits_of(spec: ModelSpec, tensors: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """(tokens, vocab) in float64: the model as it is defined, without batches, cache or padding."""

    def matrix(module: str, index: int | None = None, part: str = "weight") -> torch.Tensor | None:
        stored = tensors.get(f"{spec.module_names(module, index)[0]}.{part}")
        return None if stored is None else stored.double()

    def product(x: torch.Tensor, module: str, index: int | None = None) -> torch.Tensor:
        bias = matrix(module, index, "bias")
        return x @ matrix(module, index).T + (0 if bias is None else bias)

    def norm(x: torch.Tensor, form: NormSpec | None, module: str, index: int | None = None) -> torch.Tensor:
        if form is None:
            return x
        centred = x - x.mean(-1, keepdim=True) if form.kind == "layer" else x
        x = centred / (centred.square().mean(-1, keepdim=True) + form.eps).sqrt()
        weight, bias = matrix(module, index), matrix(module, index, "bias")
        return x * (1 if weight is None else weight) + (0 if bias is None else bias)

    def rotated(x: torch.Tensor, form: RopeSpec | None) -> torch.Tensor:
        if form is None:
            return x
        angles = torch.arange(len(ids))[:, None] * torch.tensor(form.inv_freq, dtype=torch.float64)
        cos, sin = angles.cos() * form.scaling, angles.sin() * form.scaling
        one, two = x.chunk(2, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(len(ids), count, -1).transpose(0, 1)

    activations = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    x = matrix("embed")[ids]
    for i, layer in enumerate(spec.layers):
        own, mlp = layer.attention, layer.mlp
        normed = norm(x, layer.norms.attention_in, "attention_in", i)
        q, k, v = (
            heads(product(normed, name, i), count)
            for name, count in (("q", own.heads), ("k", own.kv_heads), ("v", own.kv_heads))
        )
        q, k = rotated(q, own.rope), rotated(k, own.rope)
        k, v = (each.repeat_interleave(own.heads // own.kv_heads, 0) for each in (k, v))
        scores = (q @ k.transpose(1, 2) * own.head_dim**-0.5).masked_fill(future, -torch.inf)
        outputs = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
        x = x + product(outputs, "out", i)
        x = norm(x, layer.norms.attention_out, "attention_out", i)
        normed = norm(x, layer.norms.mlp_in, "mlp_in", i)
        inner = activations[mlp.activation](product(normed, "gate" if mlp.gated else "up", i))
        x = x + product(inner * product(normed, "up", i) if mlp.gated else inner, "down", i)
        x = norm(x, layer.norms.mlp_out, "mlp_out", i)
    return product(norm(x, spec.final_norm, "final_norm"), "head")
