"""The feed-forward half of a transformer layer, with its norm and residual connection: an MLP, plain or gated."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from flexgen.kernels.linear import linear, linears
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.layer import Context, TransformerLayer, Weights, linear_weights, slices
from flexgen.models.mlp_spec import MLPSpec
from flexgen.models.norms import norm_weights, norm_workspace, normalise
from flexgen.models.ops import ACTIVATIONS, IN_PLACE, gated
from flexgen.models.sources import Source
from flexgen.models.spec import ModelSpec, NormSpec, WeightSpec


class FeedForward(TransformerLayer):
    """x + network(x), with norms before and after the network."""

    def __init__(self, spec: ModelSpec, index: int, weights: tuple[WeightSpec, ...]) -> None:
        """weights: those of the network."""
        norms = spec.layers[index].norms
        first = norm_weights(spec, norms.mlp_in, "mlp_in", index)
        last = norm_weights(spec, norms.mlp_out, "mlp_out", index, "out_norm")
        if spec.layers[index].scaled:
            last += (WeightSpec("scale", (1,), tuple(map(Source, spec.module_names("layer_scale", index)))),)
        super().__init__(spec, f"layers.{index}.mlp", first + weights + last, index)

    @property
    def norm_in(self) -> NormSpec | None:
        """The norm of its input. If it is shared with attention, attention has its weights."""
        layer = self.layer_spec
        shared = layer.residual == "parallel" and layer.norms.mlp_in is None
        return layer.norms.attention_in if shared else layer.norms.mlp_in

    @abstractmethod
    def network(self, x: Tensor, weights: Weights) -> Tensor:
        """The output of the network for x (..., hidden), which is normalised. A new tensor."""

    @abstractmethod
    def network_flops(self, tokens: int) -> int:
        """Operations of `network` for `tokens` tokens."""

    @abstractmethod
    def network_workspace(self, tokens: int, dtype: torch.dtype, workspaces: Workspaces) -> int:
        """An upper estimate of the peak memory of `network`, including its result."""

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
        # No name for the normalised input, so that it is freed before the residual connection.
        out = self.network(normalise(self.norm_in, x, weights), weights)
        out = self.joined(out, self.layer_spec.norms.mlp_out, onto, weights)
        return out.mul_(weights["scale"]) if self.layer_spec.scaled else out

    def flops(self, rows: int, seq: int, context: int) -> int:
        return self.network_flops(rows * seq)

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        spec, tokens = self.spec, min(rows * seq, self.spec.chunk_tokens)
        hidden = tokens * spec.hidden_size * dtype.itemsize
        norm_in, norm_out = (
            norm_workspace(norm, spec.hidden_size, tokens, dtype, workspaces)
            for norm in (self.norm_in, self.layer_spec.norms.mlp_out)
        )
        normed = 0 if self.norm_in is None else hidden
        most = max(norm_in, normed + self.network_workspace(tokens, dtype, workspaces), hidden + norm_out)
        # With chunks, the whole result is allocated too.
        return most + (rows * seq * spec.hidden_size * dtype.itemsize if rows * seq > tokens else 0)


class MLP(FeedForward):
    """x + down(activation(up(x))), or x + down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__(spec, index, mlp_weights(spec, _mlp(spec, index), index))

    @property
    def _mlp(self) -> MLPSpec:
        return _mlp(self.spec, self.index)

    def network(self, x: Tensor, weights: Weights) -> Tensor:
        return compute_mlp(self._mlp, x, weights)

    def network_flops(self, tokens: int) -> int:
        return mlp_flops(self._mlp, self.spec.hidden_size, tokens)

    def network_workspace(self, tokens: int, dtype: torch.dtype, workspaces: Workspaces) -> int:
        return mlp_workspace(self._mlp, self.spec.hidden_size, tokens, dtype, workspaces)


def _mlp(spec: ModelSpec, index: int) -> MLPSpec:
    mlp = spec.layers[index].mlp
    assert isinstance(mlp, MLPSpec)
    return mlp


def mlp_weights(spec: ModelSpec, mlp: MLPSpec, index: int, prefix: str = "") -> tuple[WeightSpec, ...]:
    """The weights of an MLP of layer `index`. prefix: the beginning of their names and of those of the modules."""
    if mlp.fused:
        sizes = {"gate_up": 2 * mlp.size}
    else:
        sizes = {"gate": mlp.size, "up": mlp.size} if mlp.gated else {"up": mlp.size}
    weights: tuple[WeightSpec, ...] = ()
    for module, rows in sizes.items():
        weights += linear_weights(spec, prefix + module, rows, spec.hidden_size, mlp.bias, index)
    return weights + linear_weights(spec, f"{prefix}down", spec.hidden_size, mlp.size, mlp.bias, index)


def compute_mlp(mlp: MLPSpec, x: Tensor, weights: Weights, prefix: str = "") -> Tensor:
    """The output (..., hidden) of an MLP for x (..., hidden)."""

    def product(y: Tensor, module: str) -> Tensor:
        return linear(y, weights[f"{prefix}{module}.weight"], weights.get(f"{prefix}{module}.bias"))

    activation = ACTIVATIONS[mlp.activation]
    if mlp.fused:
        gate, up = product(x, "gate_up").chunk(2, dim=-1)
        inner = gated(mlp.activation, gate, up)
        del gate, up
    elif mlp.gated and mlp.activation in IN_PLACE:
        names = [f"{prefix}gate", f"{prefix}up"]
        matrices = [weights[f"{name}.weight"] for name in names]
        gate, up = linears(x, matrices, [weights.get(f"{name}.bias") for name in names])
        inner = gated(mlp.activation, gate, up)
        del gate, up
    elif mlp.gated:  # less memory: the result of the activation replaces the gate
        inner = activation(product(x, "gate"))
        inner.mul_(product(x, "up"))
    else:
        inner = activation(product(x, "up"))
    return product(inner, "down")


def mlp_flops(mlp: MLPSpec, hidden_size: int, tokens: int) -> int:
    """Operations of `compute_mlp` for `tokens` tokens."""
    matrices = 3 if mlp.gated else 2
    return 2 * tokens * matrices * hidden_size * mlp.size


def mlp_workspace(
    mlp: MLPSpec, hidden_size: int, tokens: int, dtype: torch.dtype, workspaces: Workspaces
) -> int:
    """An upper estimate of the peak memory of `compute_mlp`, including its result, in bytes."""
    hidden, ffn = (tokens * size * dtype.itemsize for size in (hidden_size, mlp.size))
    width = 2 * mlp.size if mlp.fused else mlp.size
    up = workspaces.product(tokens, width, hidden_size, dtype)
    down = workspaces.product(tokens, hidden_size, mlp.size, dtype)
    # Tensors of the inner width: gate and up, or input and output of an activation that is not in place.
    in_place = mlp.activation in IN_PLACE
    inner = ffn if in_place and not mlp.gated else 2 * ffn
    if mlp.fused:  # gate and up, their product, and the output of an activation that is not in place
        inner = 3 * ffn if in_place else 4 * ffn
    return max(inner + up, ffn + hidden + down)
