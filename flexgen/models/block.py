"""Attention and MLP of one transformer layer as one streaming unit (`sep_layer = false`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexgen.kernels.scoring import Scoring
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.attention import Attention
from flexgen.models.layer import AttentionLayer, Context, MatrixGroup, Weights
from flexgen.models.mixture import feed_forward
from flexgen.models.mlp import FeedForward
from flexgen.models.spec import ModelSpec, WeightSpec


class Block(AttentionLayer):
    """A transformer layer. The names of its weights begin with their half: "attention.q.weight", "mlp.up.weight"."""

    attention: Attention
    mlp: FeedForward

    def __init__(self, spec: ModelSpec, index: int) -> None:
        attention, mlp = Attention(spec, index), feed_forward(spec, index)
        super().__init__(
            spec,
            f"layers.{index}",
            tuple(replace(weight, name=f"attention.{weight.name}") for weight in attention.weights)
            + tuple(replace(weight, name=f"mlp.{weight.name}") for weight in mlp.weights),
            index,
        )
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "mlp", mlp)

    def scoring(self, weights: Weights) -> Scoring:
        return self.attention.scoring(_half(weights, "attention."))

    @property
    def projections(self) -> tuple[WeightSpec, ...]:
        names = [f"attention.{weight.name}" for weight in self.attention.projections]
        return tuple(weight for weight in self.weights if weight.name in names)

    @property
    def groups(self) -> Sequence[MatrixGroup]:
        def own(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(f"mlp.{name}" for name in names)

        return [MatrixGroup(f"mlp.{name}", own(m), own(biases)) for name, m, biases in self.mlp.groups]

    def reads_back(self, tokens: int, weights: Weights) -> bool:
        return self.mlp.reads_back(tokens, _half(weights, "mlp."))

    def multiplies(self, weight: WeightSpec, tokens: int) -> tuple[float, float]:
        return self.mlp.multiplies(weight, tokens)

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        return self._with_mlp(self.attention.forward(x, _half(weights, "attention."), ctx), x, weights)

    def qkv(self, x: Tensor, weights: Weights, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.qkv(x, _half(weights, "attention."), ctx)

    def output(self, outputs: Tensor, x: Tensor, weights: Weights) -> Tensor:
        return self._with_mlp(self.attention.output(outputs, x, _half(weights, "attention.")), x, weights)

    def _with_mlp(self, hidden: Tensor, x: Tensor, weights: Weights) -> Tensor:
        """`hidden`, to which attention was added, with the MLP; x is the layer's input."""
        own = _half(weights, "mlp.")
        if self.layer_spec.residual != "parallel":
            return self.mlp.transform(hidden, hidden, own)
        if self.layer_spec.norms.mlp_in is None:
            own = {**_half(weights, "attention.norm.", keep="norm."), **own}
        return self.mlp.transform(x, hidden, own)

    def flops(self, rows: int, seq: int, context: int) -> int:
        return self.attention.flops(rows, seq, context) + self.mlp.flops(rows, seq, context)

    def attention_flops(self, rows: int, seq: int, context: int) -> int:
        return self.attention.attention_flops(rows, seq, context)

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        # While the MLP runs, its input stays allocated, and with split attention the attention output too.
        outputs = min(rows * seq, self.spec.chunk_tokens) * self.layer_spec.attention.q_size
        between = (rows * seq * self.spec.hidden_size + outputs) * dtype.itemsize
        return max(
            self.attention.workspace_bytes(rows, seq, context, dtype, workspaces),
            between + self.mlp.workspace_bytes(rows, seq, context, dtype, workspaces),
        )


def _half(weights: Weights, prefix: str, keep: str = "") -> Weights:
    """The weights whose names begin with `prefix`, by their names with `keep` in its place."""
    return {keep + name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
