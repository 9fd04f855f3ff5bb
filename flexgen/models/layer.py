"""What every streaming unit of a model answers: its weights, its bytes, its flops, its forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.norms import normalise
from flexgen.models.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec, WeightSpec

Weights = Mapping[str, Any]
"""A layer's weights by name: tensors, and for an encoded matrix what `linear` and `embedding` take in its place."""


class Chunk(NamedTuple):
    """Part of a batch: these rows and, of each, these tokens."""

    rows: slice
    tokens: slice


def chunks(rows: int, seq: int, limit: int) -> Iterator[Chunk]:
    """Parts of (rows, seq) of at most `limit` tokens, in order: whole rows, or pieces of one row that is longer.

    They are of nearly equal size, so that none is too small for a product at full rate.
    """
    if seq <= limit:
        yield from (Chunk(part, slice(0, seq)) for part in slices(rows, limit // seq))
    else:
        for row in range(rows):
            yield from (Chunk(slice(row, row + 1), part) for part in slices(seq, limit))


def slices(count: int, limit: int) -> Iterator[slice]:
    """`count` things in as few nearly equal parts of at most `limit` as there can be."""
    parts = -(-count // limit)
    return (slice(count * n // parts, count * (n + 1) // parts) for n in range(parts))


class Context(Protocol):
    """What a layer is given about the call it runs in. The runtime implements it with its KV cache."""

    @property
    def positions(self) -> Tensor:
        """(batch, seq) int64 on the compute device, counted from the row's first real one; padding has 0."""

    @property
    def text_length(self) -> Tensor | None:
        """Where `positions` are a part of a prompt, the length of the batch's longest text, () int64 on the compute
        device: what rotary frequencies that depend on the length are for. None otherwise."""

    @property
    def last_only(self) -> bool:
        """The head computes logits for the last position only."""

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        """`token_factors` of `positions`, of one token for each row: the same for all layers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention of the new tokens over themselves and all tokens before them.

        q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim), positions already applied;
        returns (batch, heads, seq, head_dim).
        """

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        """Take keys and values of all new tokens, whose queries then come by `attend_chunk`."""

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`attend` for the part `chunk` of the new tokens: its q, and k and v of all of them.

        q and the result are (rows, heads, tokens, head_dim) of the chunk.
        """


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """One streaming unit: immutable and stateless, weights come with every call."""

    spec: ModelSpec
    name: str
    weights: tuple[WeightSpec, ...]

    has_cache: ClassVar[bool] = False

    @property
    def layer_spec(self) -> LayerSpec | None:
        """The transformer layer that it computes, or half of; None for both ends of the model."""
        return None

    @property
    def table(self) -> WeightSpec | None:
        """The weight of which `forward` reads nothing but the rows that the ids in x name, if there is one.

        `forward` works as well with some of its rows and with x counting among those.
        """
        return None

    @abstractmethod
    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        """x: ids (batch, seq) int64 for the input embedding, else hidden states (batch, seq, hidden).

        Returns hidden states, or logits (batch, seq or 1, vocab) for the head. Never writes into x.
        """

    @abstractmethod
    def flops(self, rows: int, seq: int, context: int) -> int:
        """Operations (a multiply-add is two) for `seq` new tokens of each of `rows` prompts.

        `context` counts the tokens that the last of them attends to, itself included. A head that runs with
        `last_only` has seq 1, here and in `workspace_bytes`.
        """

    def attention_flops(self, rows: int, seq: int, context: int) -> int:
        """The part of `flops` that works on the cache, not on the weights."""
        return 0

    def product_flops(self, rows: int, seq: int, context: int) -> int:
        """The rest of `flops`: what is multiplied with the weights."""
        return self.flops(rows, seq, context) - self.attention_flops(rows, seq, context)

    @abstractmethod
    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        """Upper estimate of what `forward` allocates at its peak: result and attention's scores included.

        Beyond `ModelSpec.chunk_tokens` new tokens it grows only by what a layer keeps of a prompt: its result, of
        attention the keys and values too, of a head with all positions their logits.

        `workspaces` are those of the device that computes. What a math library keeps for itself whatever the layer is
        left out: `workspaces.fixed`, and per thread of a CPU some 200 KiB for bfloat16 products, up to 3 MiB for
        those in float32 and up to 1 MiB for the blocks of attention.
        """

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights in `dtype`."""
        return sum(weight.nbytes(dtype) for weight in self.weights)


@dataclass(frozen=True, eq=False)
class TransformerLayer(Layer):
    """Layer number `index` of the model's transformer layers, or half of it."""

    index: int

    @property
    def layer_spec(self) -> LayerSpec:
        return self.spec.layers[self.index]

    def joined(self, out: Tensor, norm: NormSpec | None, x: Tensor, weights: Weights) -> Tensor:
        """The result `out` of attention or MLP, in its place or not, normed and added to the hidden states x."""
        layer = self.layer_spec
        if layer.residual == "post":
            return normalise(norm, out.add_(x), weights, "out_norm")
        out = normalise(norm, out, weights, "out_norm")
        if layer.residual_scale != 1:
            out.mul_(layer.residual_scale)
        return out.add_(x)


class AttentionLayer(TransformerLayer):
    """A layer with a cache, in two halves, so that a schedule can run them apart with attention between."""

    has_cache: ClassVar[bool] = True

    @property
    @abstractmethod
    def scale(self) -> float:
        """What `Context.attend` multiplies the scores by."""

    @property
    @abstractmethod
    def projections(self) -> tuple[WeightSpec, ...]:
        """The matrices that `qkv` multiplies with."""

    @abstractmethod
    def qkv(self, x: Tensor, weights: Weights, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, seq, head_dim), keys and values (batch, kv_heads, seq, head_dim) of x."""

    @abstractmethod
    def output(self, attended: Tensor, x: Tensor, weights: Weights) -> Tensor:
        """Hidden states, from attended (batch, heads, seq, head_dim) and the layer's input x."""

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        # Queries, keys and values are not kept by name: they are freed before the output is computed.
        attended = ctx.attend(*self.qkv(x, weights, ctx), self.scale)
        return self.output(attended, x, weights)


def linear_weights(
    spec: ModelSpec, module: str, out_size: int, in_size: int, bias: bool, index: int | None = None
) -> tuple[WeightSpec, ...]:
    """Weights "<module>.weight" (out_size, in_size) and, with `bias`, "<module>.bias" (out_size)."""
    sources = spec.sources(module, index)
    weight = WeightSpec(
        f"{module}.weight",
        (out_size, in_size),
        tuple(f"{s}.weight" for s in sources),
        transposed=module in spec.transposed,
    )
    if not bias:
        return (weight,)
    return weight, WeightSpec(f"{module}.bias", (out_size,), tuple(f"{s}.bias" for s in sources))
