"""What a model is, as pure data: a family's function turns a configuration into a `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: angle of pair `j` at position `p` is `p * inv_freq[j]`.

    `inv_freq` holds head_dim / 2 values; cos and sin are multiplied by `scaling`. Two kinds depend on the
    length of the sequence: `dynamic` recomputes the base beyond `original_max_positions`, `longrope`
    switches to `long_inv_freq` beyond it.
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
    """A norm over the hidden size. `affine`: it has a weight, and a layer norm a bias too."""

    kind: Literal["layernorm", "rmsnorm"]
    eps: float
    affine: bool = True


class CacheShape(NamedTuple):
    """What a layer keeps of each token: a key and a value of `head_dim` values for each of `kv_heads`."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention. `heads` is a multiple of `kv_heads`; without `rope` queries and keys are not rotated.

    `window`: how many tokens a query attends to, itself included. None is all of them, and the only value that the
    layers compute today.
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
    """A feed-forward network of inner width `size`; `gated`: the activation of one product scales another."""

    size: int
    activation: str
    gated: bool = False
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer: its attention, its MLP and the norm of each.

    Two layers with equal specs have the same weight shapes, take the same memory and cost the same.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    attention_norm: NormSpec
    mlp_norm: NormSpec
    pre_norm: bool = True
    """True: norm before attention and MLP. False: after the residual add (opt-350m)."""


Names = Mapping[str, tuple[str, ...]]
"""Where a family's checkpoints keep each module ("q", "mlp_norm", "head"): the names that it may have, in the order
in which they are tried. `{i}` stands for the index of the layer."""


def prefixed(prefixes: Sequence[str], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`Names` of modules that are stored under one of several prefixes.

    Checkpoints are saved from the model with its LM head, or from the bare decoder.
    """
    return {module: tuple(prefix + name for prefix in prefixes) for module, name in names.items()}


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of one layer.

    `name` is the name inside the layer ("q.weight"); `sources` are the names it may have in a checkpoint,
    the first that is found counts.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def encodable(self) -> bool:
        """Whether a codec may round it: not a table of positions, whose rows are added as they are."""
        return self.name != "positions.weight"

    @property
    def looked_up(self) -> bool:
        """Whether it is a table whose rows are taken by number, not a matrix that is multiplied."""
        return self.name in ("embed.weight", "positions.weight")

    @cached_property
    def key(self) -> str:
        """Identity over the whole model: a tied head and the embedding have the same key."""
        return self.sources[0]

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer: its layers, what is outside of them, and checkpoint names."""

    name: str
    family: str
    names: Names = field(hash=False)
    dtype: torch.dtype

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int
    max_positions: int
    """Length of a text that the model is made for: the rows of a learned table of positions, or the context that
    the scaling of rotary positions gives."""
    embed_size: int
    """Width of the token embedding and of the LM head, projected where it is not `hidden_size`."""

    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]

    final_norm: NormSpec | None
    tied_head: bool
    head_bias: bool = False

    positions: Literal["learned", "rope"] = "rope"
    """"learned": a table of positions is added to the embedding. "rope": each layer's attention has its own."""
    position_offset: int = 0
    """Rows of a learned position table that come before position 0."""

    chunk_tokens: int = 4096
    """Tokens that a layer computes at once, which bounds what it allocates for a long prompt. Products reach
    their full rate with some hundreds of rows on a CPU (benchmarks/host_linear.py) and with some thousands on a
    GPU, so more would only take memory."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def longest_text(self) -> float:
        """Positions that can be computed: the rows of a learned table. Rotary positions have no end."""
        return self.max_positions if self.positions == "learned" else math.inf

    @property
    def projected(self) -> bool:
        return self.embed_size != self.hidden_size

    def first_layers(self, count: int) -> ModelSpec:
        """The model without its layers from number `count` on."""
        return replace(self, layers=self.layers[:count])

    def sources(self, module: str, index: int | None = None) -> tuple[str, ...]:
        """Full names of `module` (of layer `index`), in the order in which they are tried."""
        return tuple(name.format(i=index) for name in self.names[module])
