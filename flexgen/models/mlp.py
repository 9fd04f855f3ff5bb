"""The feed-forward half of a transformer layer, plain or gated, with its norm and residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.linear import linear
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.layer import Context, TransformerLayer, Weights, linear_weights, slices
from flexgen.models.norms import norm_weights, norm_workspace, normalise
from flexgen.models.ops import ACTIVATIONS, IN_PLACE
from flexgen.models.spec import ModelSpec, NormSpec


class MLP(TransformerLayer):
    """x + down(activation(up(x))), or x + down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        hidden, layer = spec.hidden_size, spec.layers[index]
        size, bias = layer.mlp.size, layer.mlp.bias
        if layer.mlp.fused:
            sizes = {"gate_up": 2 * size}
        else:
            sizes = {"gate": size, "up": size} if layer.mlp.gated else {"up": size}
        weights = norm_weights(spec, layer.norms.mlp_in, "mlp_in", index)
        for module, rows in sizes.items():
            weights += linear_weights(spec, module, rows, hidden, bias, index)
        weights += linear_weights(spec, "down", hidden, size, bias, index)
        weights += norm_weights(spec, layer.norms.mlp_out, "mlp_out", index, "out_norm")
        super().__init__(spec, f"layers.{index}.mlp", weights, index)

    @property
    def norm_in(self) -> NormSpec | None:
        """The norm of its input. If it is shared with attention, attention has its weights."""
        layer = self.layer_spec
        shared = layer.residual == "parallel" and layer.norms.mlp_in is None
        return layer.norms.attention_in if shared else layer.norms.mlp_in

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        return self.transform(x, x, weights)

    def transform(self, x: Tensor, onto: Tensor, weights: Weights) -> Tensor:
        """The output of the network for x, plus the hidden states `onto`. Both are (batch, seq, hidden)."""
        tokens = x.shape[0] * x.shape[1]
        if tokens <= self.spec.chunk_tokens:
            return self._transform(x, onto, weights)
        out = torch.empty_like(x)
        flat, flat_onto, result = (each.view(tokens, -1) for each in (x, onto, out))
        for part in slices(tokens, self.spec.chunk_tokens):
            result[part] = self._transform(flat[part], flat_onto[part], weights)
        return out

    def _transform(self, x: Tensor, onto: Tensor, weights: Weights) -> Tensor:
        layer = self.layer_spec
        activation = ACTIVATIONS[layer.mlp.activation]
        normed = normalise(self.norm_in, x, weights)
        if layer.mlp.fused:
            gate, up = linear(normed, weights["gate_up.weight"], weights.get("gate_up.bias")).chunk(2, dim=-1)
            inner = activation(gate) * up
            del gate, up
        elif layer.mlp.gated:
            inner = activation(linear(normed, weights["gate.weight"], weights.get("gate.bias")))
            inner.mul_(linear(normed, weights["up.weight"], weights.get("up.bias")))
        else:
            inner = activation(linear(normed, weights["up.weight"], weights.get("up.bias")))
        out = linear(inner, weights["down.weight"], weights.get("down.bias"))
        del normed, inner
        return self.joined(out, layer.norms.mlp_out, onto, weights)

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
        norm_in, norm_out = (
            norm_workspace(norm, spec.hidden_size, tokens, dtype)
            for norm in (self.norm_in, layer.norms.mlp_out)
        )
        width = 2 * mlp.size if mlp.fused else mlp.size
        up = workspaces.product(tokens, width, spec.hidden_size, dtype)
        down = workspaces.product(tokens, spec.hidden_size, mlp.size, dtype)
        # Tensors of the inner width: gate and up, or input and output of an activation that is not in place.
        in_place = mlp.activation in IN_PLACE
        inner = ffn if in_place and not mlp.gated else 2 * ffn
        if mlp.fused:  # gate and up, their product, and the output of an activation that is not in place
            inner = 3 * ffn if in_place else 4 * ffn
        normed = 0 if self.norm_in is None else hidden
        most = max(norm_in, normed + inner + up, normed + ffn + hidden + down, hidden + norm_out)
        # With chunks, the whole result is allocated too.
        return most + (rows * seq * spec.hidden_size * dtype.itemsize if rows * seq > tokens else 0)
