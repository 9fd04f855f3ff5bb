"""The interface of layers, which are the streaming units of a model: weights, memory, flops and forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from flexgen.kernels.elementwise import add_
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.models.norms import normalise
from flexgen.models.sources import tensors
from flexgen.models.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec, WeightSpec

Weights = Mapping[str, Any]
"""The weights of a layer by name: tensors, or for encoded matrices objects that `linear` and `embedding` accept. On a
GPU also the `GroupedMatrices` of `Layer.groups`."""


class MatrixGroup(NamedTuple):
    """The names of matrices that a layer multiplies with a group of rows each, and of their biases, if they have any.

    name: that of their `GroupedMatrices` in the weights of a layer, if the device has products of groups.
    """

    name: str
    matrices: tuple[str, ...]
    biases: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """Part of a batch: a range of rows, and a range of tokens in each of them."""

    rows: slice
    tokens: slice


def chunks(rows: int, seq: int, limit: int) -> Iterator[Chunk]:
    """Divide (rows, seq) into parts of at most `limit` tokens, in order: whole rows, or pieces of one longer row.

    The parts have nearly equal sizes, so that none is too small for products at full speed.
    """
    if seq <= limit:
        yield from (Chunk(part, slice(0, seq)) for part in slices(rows, limit // seq))
    else:
        for row in range(rows):
            yield from (Chunk(slice(row, row + 1), part) for part in slices(seq, limit))


def slices(count: int, limit: int) -> Iterator[slice]:
    """Divide range(count) into as few parts of at most `limit` as possible, of nearly equal size."""
    parts = -(-count // limit)
    return (slice(count * n // parts, count * (n + 1) // parts) for n in range(parts))


class Context(Protocol):
    """The data of a call for its layers. The runtime implements it with its KV cache."""

    @property
    def positions(self) -> Tensor:
        """(batch, seq) int64 on the compute device, counted from the first real token of each row; 0 for padding."""

    @property
    def text_length(self) -> Tensor | None:
        """The length of the longest text of the batch, () int64 on the compute device, if `positions` are only a
        part of a prompt; otherwise None. Rotary frequencies that depend on the length need it."""

    @property
    def last_only(self) -> bool:
        """Whether the head computes logits for the last position only."""

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        """`token_factors` of `positions`, for a token or a few of each row. They are the same for all layers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Causal attention of the new tokens over themselves and all tokens before them.

        q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim), positions already applied;
        returns (batch, heads, seq, head_dim).
        """

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        """Store the keys and values of all new tokens. Their queries follow in calls of `attend_chunk`."""

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """`attend` for a part of the new tokens.

        q and the result have the rows and tokens of `chunk`, (rows, heads, tokens, head_dim). k and v have all new
        tokens.
        """


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """One streaming unit. It is immutable and stateless: weights are arguments of each call."""

    spec: ModelSpec
    name: str
    weights: tuple[WeightSpec, ...]

    has_cache: ClassVar[bool] = False

    @property
    def layer_spec(self) -> LayerSpec | None:
        """The spec of its transformer layer; None for the embedding and the head."""
        return None

    @property
    def table(self) -> WeightSpec | None:
        """The weight of which `forward` reads only the rows given by the ids in x; None if there is none.

        `forward` also accepts a table with some of the rows, and x as indices into them.
        """
        return None

    @cached_property
    def units(self) -> Sequence[Sequence[WeightSpec]]:
        """The weights by `WeightSpec.unit`, the largest unit first."""
        units: dict[str, list[WeightSpec]] = {}
        for weight in self.weights:
            units.setdefault(weight.unit or weight.name, []).append(weight)
        return sorted(units.values(), key=lambda unit: -sum(weight.numel for weight in unit))

    @property
    def groups(self) -> Sequence[MatrixGroup]:
        """The matrices that are multiplied with groups of rows, in calls for all groups."""
        return ()

    def reads_back(self, tokens: int, weights: Weights) -> bool:
        """Whether the host needs a result of the device while it computes the layer for `tokens` tokens."""
        return False

    def multiplies(self, weight: WeightSpec, tokens: int) -> tuple[float, float]:
        """The rows of the product with one of the layer's matrices, and the probability that there is a product.

        Both are expected values for a pass over `tokens` tokens in total. They are `tokens` and 1, except for an
        expert of a mixture.
        """
        return tokens, 1.0

    @abstractmethod
    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        """Compute the layer.

        x: ids (batch, seq) int64 for the input embedding, otherwise hidden states (batch, seq, hidden). It is not
        modified. Returns hidden states, or for the head logits (batch, seq or 1, vocab).
        """

    @abstractmethod
    def flops(self, rows: int, seq: int, context: int) -> int:
        """Operations (two for a multiply-add) for `seq` new tokens of each of `rows` prompts.

        context: the number of tokens that the last new token attends to, including itself. For a head that runs with
        `last_only`, seq is 1, here and in `workspace_bytes`.
        """

    def attention_flops(self, rows: int, seq: int, context: int) -> int:
        """The part of `flops` for attention over the cache."""
        return 0

    def product_flops(self, rows: int, seq: int, context: int) -> int:
        """The rest of `flops`: products with the weights."""
        return self.flops(rows, seq, context) - self.attention_flops(rows, seq, context)

    @abstractmethod
    def workspace_bytes(
        self, rows: int, seq: int, context: int, dtype: torch.dtype, workspaces: Workspaces = HOST
    ) -> int:
        """An upper estimate of the peak memory that `forward` allocates, including its result and attention scores.

        Beyond `ModelSpec.chunk_tokens` new tokens, it grows only by data of the whole prompt: the result, the keys
        and values of attention, and the logits of a head with all positions.

        workspaces: the workspaces of the compute device. The fixed memory of a math library is not included: this is
        `workspaces.fixed`, and for each thread of a CPU about 200 KiB for bfloat16 products, up to 3 MiB for float32
        products and up to 1 MiB for the blocks of attention.
        """

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights in `dtype`."""
        return sum(weight.nbytes(dtype) for weight in self.weights)


@dataclass(frozen=True, eq=False)
class TransformerLayer(Layer):
    """Transformer layer number `index` of the model, or one half of it."""

    index: int

    @cached_property
    def layer_spec(self) -> LayerSpec:
        return self.spec.layers[self.index]

    def joined(self, out: Tensor, norm: NormSpec | None, x: Tensor, weights: Weights) -> Tensor:
        """The hidden states x plus `out`, the output of attention or MLP, with its norm. May overwrite `out`."""
        layer = self.layer_spec
        if layer.residual == "post":
            return normalise(norm, add_(out, x), weights, "out_norm")
        out = normalise(norm, out, weights, "out_norm")
        if layer.residual_scale != 1:
            out.mul_(layer.residual_scale)
        return add_(out, x)


class AttentionLayer(TransformerLayer):
    """A layer with a cache, in two halves, so that a schedule can run attention as a separate step between them."""

    has_cache: ClassVar[bool] = True

    @abstractmethod
    def scoring(self, weights: Weights) -> Scoring:
        """The scoring of the layer, for `Context.attend`."""

    @property
    @abstractmethod
    def projections(self) -> tuple[WeightSpec, ...]:
        """The weight matrices of `qkv`."""

    @abstractmethod
    def qkv(self, x: Tensor, weights: Weights, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, seq, head_dim), keys and values (batch, kv_heads, seq, head_dim) of x."""

    @abstractmethod
    def output(self, outputs: Tensor, x: Tensor, weights: Weights) -> Tensor:
        """The hidden states, from the attention output (batch, heads, seq, head_dim) and the layer's input x."""

    def forward(self, x: Tensor, weights: Weights, ctx: Context) -> Tensor:
        # No names for queries, keys and values, so that they are freed before the output is computed.
        outputs = ctx.attend(*self.qkv(x, weights, ctx), self.scoring(weights))
        return self.output(outputs, x, weights)


def linear_weights(
    spec: ModelSpec, module: str, out_size: int, in_size: int, bias: bool, index: int | None = None
) -> tuple[WeightSpec, ...]:
    """The weights "<module>.weight" (out_size, in_size) and, with `bias`, "<module>.bias" (out_size)."""
    names = spec.module_names(module, index)
    weight = WeightSpec(
        f"{module}.weight",
        (out_size, in_size),
        tensors(names, "weight"),
        transposed=module in spec.transposed,
        encodable=module != "positions",
    )
    return (weight, WeightSpec(f"{module}.bias", (out_size,), tensors(names, "bias"))) if bias else (weight,)
