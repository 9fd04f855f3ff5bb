"""The description of a model as plain data. A family's `to_spec` converts a config to a `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: the angle of pair `j` at position `p` is `p * inv_freq[j]`.

    `inv_freq` has head_dim / 2 values; cos and sin are multiplied by `scaling`. Two kinds depend on the length of the
    sequence: beyond `original_max_positions`, `dynamic` recomputes the base, and `longrope` uses `long_inv_freq`.
    """

    kind: str
    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    long_inv_freq: tuple[float, ...] = ()


@dataclass(frozen=True)
class NormSpec:
    """A norm over the hidden size. `affine`: it has a weight and, for a layer norm, a bias."""

    kind: Literal["layernorm", "rmsnorm"]
    eps: float
    affine: bool = True


class CacheShape(NamedTuple):
    """The cache of a layer for one token: a key and a value of `head_dim` values for each of `kv_heads` heads."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention. `heads` is a multiple of `kv_heads`. Without `rope`, queries and keys are not rotated.

    window: the number of tokens that a query attends to, including itself. None, the only value that the layers
    support today, is all tokens.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    rope: RopeSpec | None = None
    window: None = None

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward network of inner width `size`. `gated`: the activation of one projection multiplies another."""

    size: int
    activation: str
    gated: bool = False
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer: its attention, its MLP and the norm of each.

    Two layers with equal specs have the same weight shapes, memory and cost.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    attention_norm: NormSpec
    mlp_norm: NormSpec
    pre_norm: bool = True
    """True: norms before attention and MLP. False: norms after the residual connection (opt-350m)."""


Names = Mapping[str, tuple[str, ...]]
"""The names in a family's checkpoints for each module ("q", "mlp_norm", "head"), in the order in which they are
tried. `{i}` is the index of the layer."""


def prefixed(prefixes: Sequence[str], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`Names` for modules that are stored with one of several prefixes.

    A checkpoint can be saved from the model with its LM head or from the bare decoder.
    """
    return {module: tuple(prefix + name for prefix in prefixes) for module, name in names.items()}


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of one layer.

    `name` is the name inside the layer ("q.weight"). `sources` are the possible names in a checkpoint; the first one
    that exists is used.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def encodable(self) -> bool:
        """Whether a codec may round it. A table of positions is not encoded, because its rows are added directly."""
        return self.name != "positions.weight"

    @property
    def looked_up(self) -> bool:
        """Whether it is a table for lookups by index, not a matrix for products."""
        return self.name in ("embed.weight", "positions.weight")

    @cached_property
    def key(self) -> str:
        """The identity of the tensor in the model. A tied head and the embedding have the same key."""
        return self.sources[0]

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer: its layers, the parts outside of them, and the names in checkpoints."""

    name: str
    family: str
    names: Names = field(hash=False)
    dtype: torch.dtype

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int
    max_positions: int
    """The longest text that the model was made for: the rows of a learned table of positions, or the context length
    with the scaling of the rotary positions."""
    embed_size: int
    """The width of the token embedding and the LM head. They are projected if it is not `hidden_size`."""

    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]

    final_norm: NormSpec | None
    tied_head: bool
    head_bias: bool = False

    positions: Literal["learned", "rope"] = "rope"
    """"learned": a table of positions is added to the embedding. "rope": each layer's attention has its own."""
    position_offset: int = 0
    """The number of rows before position 0 in a learned table of positions."""

    chunk_tokens: int = 4096
    """The maximum number of tokens that a layer computes at once. It limits the memory for a long prompt. Products
    reach full speed with a few hundred rows on a CPU (benchmarks/host_linear.py) and a few thousand on a GPU, so more
    tokens would only use more memory."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def longest_text(self) -> float:
        """The maximum number of positions: the rows of a learned table, or infinite for rotary positions."""
        return self.max_positions if self.positions == "learned" else math.inf

    @property
    def projected(self) -> bool:
        return self.embed_size != self.hidden_size

    def first_layers(self, count: int) -> ModelSpec:
        """The model with only its first `count` layers."""
        return replace(self, layers=self.layers[:count])

    def sources(self, module: str, index: int | None = None) -> tuple[str, ...]:
        """The full names of `module` (in layer `index`), in the order in which they are tried."""
        return tuple(name.format(i=index) for name in self.names[module])
