"""Self-attention with its norm and residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.linear import linear
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.layer import (
    AttentionLayer,
    Context,
    Weights,
    chunks,
    linear_weights,
    norm_weights,
    norm_workspace,
)
from flexgen.models.ops import MASK_VALUES, apply_rope, normalise, rope_tables, rotate_token
from flexgen.models.spec import ModelSpec, WeightSpec
from flexgen.units import align


class Attention(AttentionLayer):
    """Norm, query, key and value projections, attention and output projection."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        hidden, layer = spec.hidden_size, spec.layers[index]
        own = layer.attention
        super().__init__(
            spec,
            f"layers.{index}.attention",
            norm_weights(spec, layer.attention_norm, "attention_norm", index)
            + linear_weights(spec, "q", own.q_size, hidden, own.qkv_bias, index)
            + linear_weights(spec, "k", own.kv_size, hidden, own.qkv_bias, index)
            + linear_weights(spec, "v", own.kv_size, hidden, own.qkv_bias, index)
            + linear_weights(spec, "out", hidden, own.q_size, own.out_bias, index),
            index,
        )

    @property
    def scale(self) -> float:
        return self.layer_spec.attention.head_dim**-0.5

    @property
    def projections(self) -> tuple[WeightSpec, ...]:
        return tuple(w for w in self.weights if w.name in ("q.weight", "k.weight", "v.weight"))

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        rows, seq = x.shape[:2]
        if seq > 1 and rows * seq > self.spec.chunk_tokens:
            return self._in_chunks(x, weights, ctx)
        return super().forward(x, weights, ctx)

    def qkv(self, x: Tensor, weights: Weights, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        rope = self.layer_spec.attention.rope
        if rope is None or x.shape[1] > 1:
            q, k, v = self._project(x, weights, ctx.positions, "q", "k", "v", length=ctx.text_length)
            return q, k, v
        normed = self._before(x, weights)
        q, k, v = (self._heads(normed, weights, name) for name in ("q", "k", "v"))
        return *rotate_token(q, k, ctx.rope_factors(rope, x.dtype)), v

    def _before(self, x: Tensor, weights: Weights) -> Tensor:
        """The input of the projections: x, after the norm if the layer is pre-norm."""
        layer = self.layer_spec
        return normalise(layer.attention_norm, x, weights) if layer.pre_norm else x

    def _project(
        self,
        x: Tensor,
        weights: Weights,
        positions: Tensor,
        *names: str,
        length: Tensor | None = None,
    ) -> list[Tensor]:
        """The projections in `names`, out of "q", "k" and "v". `length`: see `rope_tables`."""
        normed, rope = self._before(x, weights), self.layer_spec.attention.rope
        made = [self._heads(normed, weights, name) for name in names]
        if rope is not None:
            cos, sin = rope_tables(rope, positions, x.dtype, length)
            made = [
                each if name == "v" else apply_rope(each, cos, sin)
                for name, each in zip(names, made, strict=True)
            ]
        return made

    def _in_chunks(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        """For many new tokens: keys and values of all tokens, then queries, attention and output by chunks."""
        own, (rows, seq) = self.layer_spec.attention, x.shape[:2]
        parts = list(chunks(rows, seq, self.spec.chunk_tokens))
        # With its own largest position, each chunk would be scaled differently.
        stretched = own.rope is not None and own.rope.kind in ("dynamic", "longrope")
        length = ctx.text_length
        if stretched and length is None:
            length = ctx.positions.max() + 1
        # Token-major, like the results of products.
        shape = (rows, seq, own.kv_heads, own.head_dim)
        k, v = (x.new_empty(shape).transpose(1, 2) for _ in range(2))
        for part in parts:
            made = self._project(x[part], weights, ctx.positions[part], "k", "v", length=length)
            for whole, each in zip((k, v), made, strict=True):
                whole[part.rows, :, part.tokens] = each
            del made, each
        ctx.keep_new(k, v)
        out = torch.empty_like(x)
        for part in parts:
            (q,) = self._project(x[part], weights, ctx.positions[part], "q", length=length)
            attended = ctx.attend_chunk(part, q, k, v, self.scale)
            del q
            out[part] = self.output(attended, x[part], weights)
            del attended
        return out

    def output(self, attended: Tensor, x: Tensor, weights: Weights) -> Tensor:
        layer = self.layer_spec
        merged = attended.transpose(1, 2).reshape(*x.shape[:2], layer.attention.q_size)
        out = linear(merged, weights["out.weight"], weights.get("out.bias")).add_(x)
        return out if layer.pre_norm else normalise(layer.attention_norm, out, weights)

    def _heads(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        flat = linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return flat.view(*x.shape[:2], -1, self.layer_spec.attention.head_dim).transpose(1, 2)

    def flops(self, rows: int, seq: int, context: int) -> int:
        own = self.layer_spec.attention
        projections = self.spec.hidden_size * (2 * own.q_size + 2 * own.kv_size)
        return 2 * rows * seq * projections + self.attention_flops(rows, seq, context)

    def attention_flops(self, rows: int, seq: int, context: int) -> int:
        # Each new token attends to the tokens up to itself, so a triangle of pairs is missing.
        pairs = seq * context - seq * (seq - 1) // 2
        return 4 * rows * pairs * self.layer_spec.attention.q_size

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        limit = self.spec.chunk_tokens
        if seq == 1 or rows * seq <= limit:
            return self._workspace(rows, seq, context, dtype, workspaces)
        # Keys, values and the result have all tokens. Everything else has one chunk, plus a mask if the chunk is
        # part of a row.
        at_once, kv_size = min(seq, limit), self.layer_spec.attention.kv_size
        whole = rows * seq * (self.spec.hidden_size + 2 * kv_size) * dtype.itemsize
        return whole + self._workspace(limit // at_once, at_once, context, dtype, workspaces)

    def _workspace(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces
    ) -> int:
        """The workspace of tokens that are computed at once."""
        layer, hidden = self.layer_spec, self.spec.hidden_size
        own, tokens, item = layer.attention, rows * seq, dtype.itemsize
        qkv = tokens * (own.q_size + 2 * own.kv_size) * item
        project = tokens * hidden * item + qkv
        if own.rope is not None:
            # Angles, cos and sin in float32; then the two halves and the rotated copy of the queries.
            project += tokens * own.head_dim * 3 * torch.float32.itemsize + 3 * tokens * own.q_size * item
        attended = tokens * own.q_size * item
        if seq > 1:
            # K and V are expanded to all heads, and the result of each run of rows is copied into the result of
            # the batch.
            attend = qkv + 2 * attended + (2 * attended if own.heads != own.kv_heads else 0)
            queries = seq if seq == context else min(seq, max(MASK_VALUES // context, 1))
            attend += workspaces.attention(rows, own.heads, queries, context, own.head_dim, dtype)
            attend += queries * context * item if queries < context else 0  # the mask
        else:
            # Scores and probabilities in float32, probabilities in `dtype`, one page of products and the padding
            # mask. The cache rounds the context up to whole pages.
            scores = rows * own.heads * align(context, 256)
            attend = qkv + 2 * attended + scores * (3 * torch.float32.itemsize + 2 * item + 1)
        merge = 2 * attended + 2 * tokens * hidden * item
        norm = norm_workspace(layer.attention_norm, hidden, tokens, dtype)
        shapes = (own.q_size, hidden), (hidden, own.q_size)
        products = max(workspaces.product(tokens, *shape, dtype) for shape in shapes)
        return max(norm, project + products, attend, merge + products + (0 if layer.pre_norm else norm))
