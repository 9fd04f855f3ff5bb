"""The feed-forward half of a transformer layer, plain or gated, with its norm and residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.linear import linear
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.layer import (
    Context,
    TransformerLayer,
    Weights,
    linear_weights,
    norm_weights,
    norm_workspace,
    slices,
)
from flexgen.models.ops import ACTIVATIONS, IN_PLACE, normalise
from flexgen.models.spec import ModelSpec


class MLP(TransformerLayer):
    """x + down(activation(up(x))), or x + down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        hidden, layer = spec.hidden_size, spec.layers[index]
        size, bias = layer.mlp.size, layer.mlp.bias
        super().__init__(
            spec,
            f"layers.{index}.mlp",
            norm_weights(spec, layer.mlp_norm, "mlp_norm", index)
            + (linear_weights(spec, "gate", size, hidden, bias, index) if layer.mlp.gated else ())
            + linear_weights(spec, "up", size, hidden, bias, index)
            + linear_weights(spec, "down", hidden, size, bias, index),
            index,
        )

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        return self.transform(x, weights)

    def transform(self, x: Tensor, weights: Weights) -> Tensor:
        """`forward` without a context, which it does not need."""
        tokens = x.shape[0] * x.shape[1]
        if tokens <= self.spec.chunk_tokens:
            return self._transform(x, weights)
        out = torch.empty_like(x)
        flat, result = x.view(tokens, -1), out.view(tokens, -1)
        for part in slices(tokens, self.spec.chunk_tokens):
            result[part] = self._transform(flat[part], weights)
        return out

    def _transform(self, x: Tensor, weights: Weights) -> Tensor:
        layer = self.layer_spec
        activation = ACTIVATIONS[layer.mlp.activation]
        normed = normalise(layer.mlp_norm, x, weights) if layer.pre_norm else x
        if layer.mlp.gated:
            inner = activation(linear(normed, weights["gate.weight"], weights.get("gate.bias")))
            inner.mul_(linear(normed, weights["up.weight"], weights.get("up.bias")))
        else:
            inner = activation(linear(normed, weights["up.weight"], weights.get("up.bias")))
        out = linear(inner, weights["down.weight"], weights.get("down.bias")).add_(x)
        return out if layer.pre_norm else normalise(layer.mlp_norm, out, weights)

    def flops(self, rows: int, seq: int, context: int) -> int:
        mlp = self.layer_spec.mlp
        matrices = 3 if mlp.gated else 2
        return 2 * rows * seq * matrices * self.spec.hidden_size * mlp.size

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        spec, layer, tokens = self.spec, self.layer_spec, min(rows * seq, self.spec.chunk_tokens)
        mlp = layer.mlp
        hidden, ffn = (tokens * size * dtype.itemsize for size in (spec.hidden_size, mlp.size))
        norm = norm_workspace(layer.mlp_norm, spec.hidden_size, tokens, dtype)
        up = workspaces.product(tokens, mlp.size, spec.hidden_size, dtype)
        down = workspaces.product(tokens, spec.hidden_size, mlp.size, dtype)
        # Tensors of the inner width: gate and up, or input and output of an activation that is not in place.
        inner = ffn if mlp.activation in IN_PLACE and not mlp.gated else 2 * ffn
        normed = hidden if layer.pre_norm else 0
        after = down if layer.pre_norm else max(down, norm)
        most = max(norm, normed + inner + up, normed + ffn + hidden + after)
        # With chunks, the whole result is allocated too.
        return most + (rows * seq * spec.hidden_size * dtype.itemsize if rows * seq > tokens else 0)
