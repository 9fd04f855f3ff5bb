"""The first and the last layer of a model: ids to hidden states, and hidden states to logits."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.linear import embedding, linear
from flexgen.kernels.scoring import capped
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.layer import Context, Layer, Weights, chunks, linear_weights
from flexgen.models.norms import norm_weights, norm_workspace, normalise
from flexgen.models.sources import tensors
from flexgen.models.spec import ModelSpec, WeightSpec


def _vocabulary(spec: ModelSpec, name: str) -> WeightSpec:
    """The (vocab, embed) matrix of the embedding or the head. With a tied head, both are one tensor."""
    embed, head = (tensors(spec.module_names(end), "weight") for end in ("embed", "head"))
    sources = embed + head if spec.tied_head else {"embed": embed, "head": head}[name]
    return WeightSpec(f"{name}.weight", (spec.vocab_size, spec.embed_size), sources)


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


class InputEmbed(Layer):
    """Token embedding, projected to the hidden size if it is narrower, plus learned positions if there are any."""

    def __init__(self, spec: ModelSpec) -> None:
        weights: tuple[WeightSpec, ...] = (_vocabulary(spec, "embed"),)
        if spec.projected:
            weights += linear_weights(spec, "project_in", spec.hidden_size, spec.embed_size, bias=False)
        if spec.positions == "learned":
            table = spec.max_positions + spec.position_offset
            weights += linear_weights(spec, "positions", table, spec.hidden_size, bias=False)
        weights += norm_weights(spec, spec.embed_norm, "embed_norm", name="embed_norm")
        super().__init__(spec, "embed", weights)

    @property
    def table(self) -> WeightSpec:
        return self.weights[0]

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        rows, seq = x.shape
        # Only a table of positions needs them. Computing them takes half as long as embedding one new token.
        positions = ctx.positions if self.spec.positions == "learned" else None
        if rows * seq <= self.spec.chunk_tokens:
            return self._embed(x, weights, positions)
        table = weights["embed.weight"]
        out = torch.empty(rows, seq, self.spec.hidden_size, dtype=table.dtype, device=x.device)
        for part in chunks(rows, seq, self.spec.chunk_tokens):
            out[part] = self._embed(x[part], weights, None if positions is None else positions[part])
        return out

    def _embed(self, ids: Tensor, weights: Weights, positions: Tensor | None) -> Tensor:
        hidden = embedding(ids, weights["embed.weight"])
        if self.spec.embed_scale != 1:
            hidden.mul_(_rounded(self.spec.embed_scale, hidden.dtype))
        if self.spec.projected:
            hidden = linear(hidden, weights["project_in.weight"])
        if positions is not None:
            hidden += F.embedding(positions + self.spec.position_offset, weights["positions.weight"])
        return normalise(self.spec.embed_norm, hidden, weights, "embed_norm")

    def flops(self, rows: int, seq: int, context: int) -> int:
        spec = self.spec
        project = 2 * spec.embed_size * spec.hidden_size if spec.projected else 0
        return rows * seq * (project + (spec.hidden_size if spec.positions == "learned" else 0))

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        spec = self.spec
        widths = 2 * spec.hidden_size + (spec.embed_size if spec.projected else 0)
        tokens = min(rows * seq, spec.chunk_tokens)
        result = rows * seq * spec.hidden_size * dtype.itemsize if rows * seq > tokens else 0
        products = (
            workspaces.product(tokens, spec.hidden_size, spec.embed_size, dtype) if spec.projected else 0
        )
        norm = norm_workspace(spec.embed_norm, spec.hidden_size, tokens, dtype, workspaces)
        return tokens * (widths * dtype.itemsize + torch.int64.itemsize) + products + norm + result


class Head(Layer):
    """Final norm, projection to the width of the embedding if it differs, and LM head.

    The head is not computed in chunks, because the logits are most of its memory anyway.
    """

    def __init__(self, spec: ModelSpec) -> None:
        weights: tuple[WeightSpec, ...] = ()
        weights += norm_weights(spec, spec.final_norm, "final_norm")
        if spec.projected:
            weights += linear_weights(spec, "project_out", spec.embed_size, spec.hidden_size, bias=False)
        weights += (_vocabulary(spec, "head"),)
        if spec.head_bias:
            weights += linear_weights(spec, "head", spec.vocab_size, spec.embed_size, bias=True)[1:]
        super().__init__(spec, "head", weights)

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        if ctx.last_only:
            x = x[:, -1:]
        logits = linear(self.final(x, weights), weights["head.weight"], weights.get("head.bias"))
        if self.spec.logit_scale != 1:
            logits.mul_(self.spec.logit_scale)
        return logits if self.spec.logit_cap is None else capped(logits, self.spec.logit_cap)

    def final(self, x: Tensor, weights: Weights) -> Tensor:
        """The input of the LM head, (batch, seq, embed), after the norm and the projection."""
        x = normalise(self.spec.final_norm, x, weights)
        if self.spec.projected:
            x = linear(x, weights["project_out.weight"])
        return x

    def flops(self, rows: int, seq: int, context: int) -> int:
        spec = self.spec
        project = spec.embed_size * spec.hidden_size if spec.projected else 0
        return 2 * rows * seq * (project + spec.vocab_size * spec.embed_size)

    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        spec, tokens = self.spec, rows * seq
        widths = 2 * spec.hidden_size + spec.embed_size + spec.vocab_size
        products = max(
            workspaces.product(tokens, spec.vocab_size, spec.embed_size, dtype),
            workspaces.product(tokens, spec.embed_size, spec.hidden_size, dtype) if spec.projected else 0,
        )
        norm = norm_workspace(spec.final_norm, spec.hidden_size, tokens, dtype, workspaces)
        return tokens * widths * dtype.itemsize + norm + products
