"""Self-attention with its norm and residual connection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.linear import linear, linears
from flexgen.kernels.rotation import rotate_token
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.layer import AttentionLayer, Context, Weights, chunks, linear_weights
from flexgen.models.norms import norm_weights, norm_workspace, normalise
from flexgen.models.ops import (
    MASK_VALUES,
    apply_rope,
    rope_tables,
    scale_queries,
    scored_bytes,
)
from flexgen.models.qkv import head_norm_weights, normalised_heads, split_qkv
from flexgen.models.sources import Source
from flexgen.models.spec import ModelSpec, WeightSpec
from flexgen.units import align

_PROJECTIONS = ("q", "k", "v", "qkv")

_FEW_TOKENS = 16
"""Up to this number of new tokens of each row, the factors of their positions are made once for all layers. Those of
a prompt would take too much memory."""


class Attention(AttentionLayer):
    """Norms, query, key and value projections, attention and output projection."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        hidden, layer = spec.hidden_size, spec.layers[index]
        own = layer.attention
        if own.qkv == "separate":
            sizes = {"q": own.q_size, "k": own.kv_size}
            if not own.values.from_keys:
                sizes["v"] = own.kv_heads * own.value_dim
        else:
            sizes = {"qkv": own.q_size + 2 * own.kv_size}
        weights = norm_weights(spec, layer.norms.attention_in, "attention_in", index)
        for module, size in sizes.items():
            weights += linear_weights(spec, module, size, hidden, own.qkv_bias, index)
        weights += head_norm_weights(spec, index)
        if own.scores.sinks:
            sources = tuple(map(Source, spec.module_names("sinks", index)))
            weights += (WeightSpec("sinks", (own.heads,), sources),)
        if own.gate:
            weights += linear_weights(spec, "attention_gate", own.out_size, hidden, bias=False, index=index)
        weights += linear_weights(spec, "out", hidden, own.out_size, own.out_bias, index)
        weights += norm_weights(spec, layer.norms.attention_out, "attention_out", index, "out_norm")
        super().__init__(spec, f"layers.{index}.attention", weights, index)

    def scoring(self, weights: Weights) -> Scoring:
        own = self.layer_spec.attention
        sinks = weights["sinks"] if own.scores.sinks else None
        return Scoring(own.scale, own.scores.cap, own.scores.alibi, own.window, sinks)

    @property
    def projections(self) -> tuple[WeightSpec, ...]:
        names = [f"{module}.weight" for module in _PROJECTIONS]
        return tuple(weight for weight in self.weights if weight.name in names)

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        rows, seq = x.shape[:2]
        if seq > 1 and rows * seq > self.spec.chunk_tokens:
            return self._in_chunks(x, weights, ctx)
        return super().forward(x, weights, ctx)

    def qkv(self, x: Tensor, weights: Weights, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        rope, (rows, seq) = self.layer_spec.attention.rope, x.shape[:2]
        if rope is None or seq > _FEW_TOKENS:
            q, k, v = self._rotated(x, weights, ctx.positions, "qkv", ctx.text_length)
            return q, k, v
        q, k, v = self._projected(x.flatten(0, 1).unsqueeze(1), weights, "qkv")  # each token as a row
        q, k = rotate_token(q, k, ctx.rope_factors(rope, x.dtype), rope.interleaved)
        q, k = self._normalised([q, k], weights, "qk", rotated=True)
        q = self._scaled(q, ctx.positions.reshape(-1, 1))
        q, k, v = (each.unflatten(0, (rows, seq)).squeeze(3).transpose(1, 2) for each in (q, k, v))
        return q, k, v

    def _projected(self, x: Tensor, weights: Weights, names: str) -> list[Tensor]:
        """The projections whose letters are in `names`, in the order of "qkv": each (batch, heads, seq, head_dim).
        For a fused matrix, `names` must be "qkv"."""
        layer = self.layer_spec
        own, normed = layer.attention, normalise(layer.norms.attention_in, x, weights)
        if own.qkv == "separate":
            multiplied = [name for name in names if name != "v" or not own.values.from_keys]
            matrices = [weights[f"{name}.weight"] for name in multiplied]
            products = linears(normed, matrices, [weights.get(f"{name}.bias") for name in multiplied])
            by_name = {
                name: product.view(*x.shape[:2], own.kv_heads if name != "q" else own.heads, -1).transpose(
                    1, 2
                )
                for name, product in zip(multiplied, products, strict=True)
            }
            made = [by_name["k" if name == "v" and own.values.from_keys else name] for name in names]
        else:
            fused = linear(normed, weights["qkv.weight"], weights.get("qkv.bias"))
            made = [each.transpose(1, 2) for each in split_qkv(own, fused)]
        if "v" in names:
            made[-1] = self._stored_values(made[-1])
        return self._normalised(made, weights, names, rotated=False)

    def _stored_values(self, v: Tensor) -> Tensor:
        """v (batch, kv_heads, seq, value_dim) with its norm and factor, (batch, kv_heads, seq, head_dim)."""
        own = self.layer_spec.attention
        if own.values.from_keys and own.values.norm is None:
            v = v.clone()  # the rotation may overwrite the keys
        v = normalise(own.values.norm, v, {})
        if own.values.scale != 1:
            v = v * own.values.scale
        return v if own.value_dim == own.head_dim else F.pad(v, (0, own.head_dim - own.value_dim))

    def _normalised(self, made: list[Tensor], weights: Weights, names: str, rotated: bool) -> list[Tensor]:
        """`made` with the norm of queries and keys, if it belongs after (`rotated`) or before the rotation."""
        form = self.layer_spec.attention.qk_norm
        if form is None or form.after_rope != rotated:
            return made
        return [
            each if name == "v" else normalised_heads(form, each, weights, f"{name}_norm")
            for name, each in zip(names, made, strict=True)
        ]

    def _rotated(
        self, x: Tensor, weights: Weights, positions: Tensor, names: str, length: Tensor | None
    ) -> list[Tensor]:
        """`_projected` with rotary positions. `length`: see `rope_tables`."""
        made, rope = self._projected(x, weights, names), self.layer_spec.attention.rope
        if rope is not None:
            cos, sin = rope_tables(rope, positions, x.dtype, length)
            made = [
                each if name == "v" else apply_rope(each, cos, sin, rope.interleaved)
                for name, each in zip(names, made, strict=True)
            ]
        made = self._normalised(made, weights, names, rotated=True)
        if "q" in names:
            made[0] = self._scaled(made[0], positions)
        return made

    def _scaled(self, q: Tensor, positions: Tensor) -> Tensor:
        form = self.layer_spec.attention.scores.by_position
        return q if form is None else scale_queries(q, positions, form)

    def _in_chunks(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        """For many new tokens: keys and values of all tokens, then queries, attention and output by chunks."""
        own, (rows, seq) = self.layer_spec.attention, x.shape[:2]
        parts = list(chunks(rows, seq, self.spec.chunk_tokens))
        # With its own largest position, each chunk would be scaled differently.
        stretched = own.rope is not None and own.rope.kind in ("dynamic", "longrope")
        length = ctx.text_length
        if stretched and length is None:
            length = ctx.positions.max() + 1
        # The product of a fused matrix contains the queries too, so they are kept.
        first = "kv" if own.qkv == "separate" else "qkv"
        heads = {"q": own.heads, "k": own.kv_heads, "v": own.kv_heads}
        # Token-major, like the results of products.
        kept = {name: x.new_empty(rows, seq, heads[name], own.head_dim).transpose(1, 2) for name in first}
        for part in parts:
            made = self._rotated(x[part], weights, ctx.positions[part], first, length)
            for whole, each in zip(kept.values(), made, strict=True):
                whole[part.rows, :, part.tokens] = each
            del made, each
        ctx.keep_new(kept["k"], kept["v"])
        out = torch.empty_like(x)
        for part in parts:
            if "q" in kept:
                q = kept["q"][part.rows, :, part.tokens]
            else:
                (q,) = self._rotated(x[part], weights, ctx.positions[part], "q", length)
            outputs = ctx.attend_chunk(part, q, kept["k"], kept["v"], self.scoring(weights))
            del q
            out[part] = self.output(outputs, x[part], weights)
            del outputs
        return out

    def output(self, outputs: Tensor, x: Tensor, weights: Weights) -> Tensor:
        layer = self.layer_spec
        own = layer.attention
        merged = outputs[..., : own.value_dim].transpose(1, 2).reshape(*x.shape[:2], own.out_size)
        if own.gate:
            normed = normalise(layer.norms.attention_in, x, weights)
            merged = merged * linear(normed, weights["attention_gate.weight"]).sigmoid_()
            del normed
        out = linear(merged, weights["out.weight"], weights.get("out.bias"))
        return self.joined(out, layer.norms.attention_out, x, weights)

    def flops(self, rows: int, seq: int, context: int) -> int:
        values = sum(weight.numel for weight in self.weights if len(weight.shape) == 2)
        return 2 * rows * seq * values + self.attention_flops(rows, seq, context)

    def attention_flops(self, rows: int, seq: int, context: int) -> int:
        own = self.layer_spec.attention
        # Each new token attends to the tokens up to itself, so a triangle of pairs is missing.
        pairs = seq * context - seq * (seq - 1) // 2
        if own.window is not None:
            pairs = min(pairs, seq * own.window.size)
        return 4 * rows * pairs * own.q_size

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        limit = self.spec.chunk_tokens
        if seq == 1 or rows * seq <= limit:
            return self._workspace(rows, seq, context, dtype, workspaces)
        # Keys, values and the result have all tokens, and so do the queries of a fused matrix. Everything else has
        # one chunk, plus a mask if the chunk is part of a row.
        at_once, own = min(seq, limit), self.layer_spec.attention
        kept = 2 * own.kv_size + (0 if own.qkv == "separate" else own.q_size)
        whole = rows * seq * (self.spec.hidden_size + kept) * dtype.itemsize
        return whole + self._workspace(limit // at_once, at_once, context, dtype, workspaces)

    def _workspace(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces
    ) -> int:
        """The workspace of tokens that are computed at once."""
        layer, hidden = self.layer_spec, self.spec.hidden_size
        own, tokens, item = layer.attention, rows * seq, dtype.itemsize
        qkv = tokens * (own.q_size + 2 * own.kv_size) * item
        project = tokens * hidden * item + qkv
        if own.qkv == "groups":
            project += tokens * own.q_size * item  # a contiguous copy of the queries
        if own.qkv == "mp4":
            project += qkv
        if own.qk_norm is not None:
            project += tokens * own.q_size * item + norm_workspace(
                own.qk_norm.norm, own.q_size, tokens, dtype, workspaces
            )
        if own.values.norm is not None:
            # The norm makes the projected values contiguous.
            project += tokens * own.kv_size * item + norm_workspace(
                own.values.norm, own.kv_size, tokens, dtype, workspaces
            )
        if own.rope is not None:
            # Angles, cos and sin in float32; then the two halves and the rotated copy of the queries.
            project += tokens * own.head_dim * 3 * torch.float32.itemsize + 3 * tokens * own.q_size * item
            if 2 * len(own.rope.inv_freq) < own.head_dim:
                project += tokens * own.q_size * item  # the rotated part is copied twice
        outputs = tokens * own.q_size * item
        if seq > 1:
            # K and V are expanded to all heads, and the result of each run of rows is copied into the result of
            # the batch.
            attend = qkv + 2 * outputs + (2 * outputs if own.heads != own.kv_heads else 0)
            queries = seq if seq == context else min(seq, max(MASK_VALUES // context, 1))
            if own.scores.plain:
                attend += workspaces.attention(rows, own.heads, queries, context, own.head_dim, dtype)
            else:
                attend += scored_bytes(rows, own.heads, seq, context, dtype) + 2 * outputs
            if own.window is not None:  # the mask, and the flags from which it is made
                attend += 2 * min(MASK_VALUES, seq * context) * item
            elif queries < context:
                attend += queries * context * item  # the mask
        else:
            # Scores and probabilities in float32, probabilities in `dtype`, one page of products and the padding
            # mask. The cache rounds the context up to whole pages.
            scores = rows * own.heads * align(context, 256)
            attend = qkv + 2 * outputs + scores * (3 * torch.float32.itemsize + 2 * item + 1)
        if own.qkv != "separate":  # the values are a view, which keeps the whole product
            attend += tokens * (own.q_size + own.kv_size) * item
        merge = 2 * outputs + 2 * tokens * hidden * item
        if own.gate:  # the normalised input and the gate
            merge += tokens * hidden * item + outputs
            merge += norm_workspace(layer.norms.attention_in, hidden, tokens, dtype, workspaces)
        norm_in, norm_out = (
            norm_workspace(norm, hidden, tokens, dtype, workspaces)
            for norm in (layer.norms.attention_in, layer.norms.attention_out)
        )
        first = own.q_size if own.qkv == "separate" else own.q_size + 2 * own.kv_size
        shapes = (first, hidden), (hidden, own.out_size)
        products = max(workspaces.product(tokens, *shape, dtype) for shape in shapes)
        return max(norm_in, project + products, attend, merge + products + norm_out)
