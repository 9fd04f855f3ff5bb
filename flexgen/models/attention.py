"""Self-attention with its norm and its residual add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from flexgen.kernels.linear import linear
from flexgen.models.layer import Context, Layer, linear_weights, norm_weights, norm_workspace
from flexgen.models.ops import apply_rope, normalise, rope_tables
from flexgen.models.spec import ModelSpec
from flexgen.units import align


class Attention(Layer):
    """`output(ctx.attend(*qkv))`; the two halves are apart so that a schedule can run them apart."""

    has_cache: ClassVar[bool] = True

    def __init__(self, spec: ModelSpec, index: int) -> None:
        hidden, q_size, kv_size = spec.hidden_size, spec.q_size, spec.kv_size
        super().__init__(
            spec,
            f"layers.{index}.attention",
            norm_weights(spec, "attention_norm", index)
            + linear_weights(spec, "q", q_size, hidden, spec.qkv_bias, index)
            + linear_weights(spec, "k", kv_size, hidden, spec.qkv_bias, index)
            + linear_weights(spec, "v", kv_size, hidden, spec.qkv_bias, index)
            + linear_weights(spec, "out", hidden, q_size, spec.out_bias, index),
        )

    @property
    def scale(self) -> float:
        """What `Context.attend` multiplies the scores by."""
        return self.spec.head_dim**-0.5

    def forward(self, x: Tensor, weights: Mapping[str, Tensor], ctx: Context) -> Tensor:
        # Queries, keys and values are not kept by name: they are freed before the output is computed.
        attended = ctx.attend(*self.qkv(x, weights, ctx), self.scale)
        return self.output(attended, x, weights)

    def qkv(self, x: Tensor, weights: Mapping[str, Tensor], ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, seq, head_dim), keys and values (batch, kv_heads, seq, head_dim) of x."""
        normed = normalise(self.spec, x, weights) if self.spec.pre_norm else x
        q, k, v = (self._heads(normed, weights, name) for name in ("q", "k", "v"))
        if self.spec.rope is not None:
            cos, sin = rope_tables(self.spec.rope, ctx.positions, x.dtype)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

    def output(self, attended: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Hidden states, from attended (batch, heads, seq, head_dim) and the layer's input x."""
        merged = attended.transpose(1, 2).reshape(*x.shape[:2], self.spec.q_size)
        out = linear(merged, weights["out.weight"], weights.get("out.bias")).add_(x)
        return out if self.spec.pre_norm else normalise(self.spec, out, weights)

    def _heads(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        flat = linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return flat.view(*x.shape[:2], -1, self.spec.head_dim).transpose(1, 2)

    def flops(self, rows: int, seq: int, context: int) -> int:
        spec = self.spec
        projections = spec.hidden_size * (2 * spec.q_size + 2 * spec.kv_size)
        # Token t of the new ones attends to all that came before it: a triangle is missing at the end.
        pairs = seq * context - seq * (seq - 1) // 2
        return 2 * rows * (seq * projections + 2 * pairs * spec.q_size)

    def workspace_bytes(self, rows: int, seq: int, context: int, dtype: torch.dtype) -> int:
        spec, tokens, item = self.spec, rows * seq, dtype.itemsize
        qkv = tokens * (spec.q_size + 2 * spec.kv_size) * item
        project = tokens * spec.hidden_size * item + qkv
        if spec.rope is not None:
            # Angles, cos and sin in float32; then the halves and the rotated copy of the queries.
            project += tokens * spec.head_dim * 3 * torch.float32.itemsize + 3 * tokens * spec.q_size * item
        attended = tokens * spec.q_size * item
        if seq > 1:
            # K and V are expanded to all heads, and the result of each run of rows is placed into that of
            # the batch.
            attend = qkv + 2 * attended + (2 * attended if spec.num_heads != spec.num_kv_heads else 0)
        else:
            # Scores and probabilities in float32, probabilities again in `dtype`, one page of products and
            # the padding mask; the cache rounds the context up to whole pages.
            scores = rows * spec.num_heads * align(context, 256)
            attend = qkv + 2 * attended + scores * (3 * torch.float32.itemsize + 2 * item + 1)
        merge = 2 * attended + 2 * tokens * spec.hidden_size * item
        norm = norm_workspace(spec, tokens, dtype)
        return max(norm, project, attend, merge + (0 if spec.pre_norm else norm))
