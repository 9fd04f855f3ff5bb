"""What a model is, as pure data: a family's function turns a configuration into a `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: angle of pair `j` at position `p` is `p * inv_freq[j]`.

    The first 2 * len(inv_freq) values of a head are rotated; the others stay as they are. cos and sin are multiplied
    by `scaling`. Two kinds depend on the length of the sequence: `dynamic` recomputes the base beyond
    `original_max_positions`, `longrope` switches to `long_inv_freq` beyond it.
    """

    kind: str
    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    long_inv_freq: tuple[float, ...] = ()
    interleaved: bool = False
    """True: pair `j` is values 2j and 2j + 1. False: values j and j + len(inv_freq)."""


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last dimension: RMS norm, or layer norm, which subtracts the mean first."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    plus: float = 0.0
    """What is added to the stored weight."""
    cast: Literal["before", "after"] = "before"
    """When an RMS norm rounds to the model's dtype: before the product with the weight, or after it. A layer norm
    always rounds after it."""


@dataclass(frozen=True)
class LayerNorms:
    """The norms of a layer by their place: of what goes into attention or MLP, and of what comes out. None: no norm.

    A norm of an output comes before the residual add, and after it where `LayerSpec.residual` is "post".
    """

    attention_in: NormSpec | None = None
    attention_out: NormSpec | None = None
    mlp_in: NormSpec | None = None
    mlp_out: NormSpec | None = None


@dataclass(frozen=True)
class QKNormSpec:
    """A norm of queries and keys before they are rotated.

    `over`: "head" normalises each head, with one weight for all heads; "all" normalises all heads together; "each"
    normalises each head, with a weight for each.
    """

    norm: NormSpec
    over: Literal["head", "all", "each"] = "head"


@dataclass(frozen=True)
class QueryScaling:
    """Queries at position `p` are multiplied by 1 + beta * log(1 + floor(p / length))."""

    beta: float
    length: int


class CacheShape(NamedTuple):
    """What a layer keeps of each token: a key and a value of `head_dim` values for each of `kv_heads`."""

    kv_heads: int
    head_dim: int


QKVForm = Literal["separate", "rows", "heads", "groups", "mp4"]
"""How a checkpoint stores the projections of queries, keys and values.

"separate": three matrices. Others: one matrix, which stays one matrix; its product is split. "rows": all queries,
then all keys, then all values. "heads": query, key and value of the first head, then of the second. "groups": the
queries of a group, its key and its value, then the next group. "mp4": four parts, each with a quarter of the queries,
of the values and of the keys.
"""


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention. `heads` is a multiple of `kv_heads`; without `rope` queries and keys are not rotated."""

    heads: int
    kv_heads: int
    head_dim: int

    qkv: QKVForm = "separate"
    qkv_bias: bool = False
    out_bias: bool = False

    qk_norm: QKNormSpec | None = None
    rope: RopeSpec | None = None
    query_scaling: QueryScaling | None = None

    score_scale: float | None = None
    """What scores are multiplied by. None: head_dim ** -0.5."""
    window: int | None = None
    """How many tokens a query attends to, itself included. None: all of them. No layer computes a shorter window:
    `ModelSpec.longest_text` is at most the window."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward network of inner width `size`; `gated`: the activation of one product scales another.

    `fused`: one matrix has the rows of the gate, then those of what it scales.
    """

    size: int
    activation: str
    gated: bool = False
    fused: bool = False
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer: its attention, its MLP, their norms, and how their results join the hidden states.

    Two layers with equal specs have the same weight shapes, take the same memory and cost the same.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    norms: LayerNorms

    residual: Literal["serial", "parallel", "post"] = "serial"
    """"serial": the MLP takes the hidden states that attention was added to. "parallel": both take the layer's input;
    without `norms.mlp_in` the MLP shares attention's norm. "post": serial, and a norm of an output comes after the
    residual add."""
    residual_scale: float = 1.0
    """What the results of attention and MLP are multiplied by before they are added."""


Names = Mapping[str, tuple[str, ...]]
"""Where a family's checkpoints keep each module ("q", "mlp_in", "head"): the names that it may have, in the order
in which they are tried. `{i}` stands for the index of the layer, `{h}` for that of a head."""


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
    transposed: bool = False
    """Whether files store the matrix as (in, out): it is transposed when it is read."""
    unflattened: tuple[int, ...] = ()
    """The shape in files, where they store the same values, row by row, in another shape."""

    @property
    def encodable(self) -> bool:
        """Whether a codec may round it: not a table of positions, whose rows are added as they are."""
        return self.name != "positions.weight"

    @property
    def looked_up(self) -> bool:
        """Whether it is a table whose rows are taken by number, not a matrix that is multiplied."""
        return self.name in ("embed.weight", "positions.weight")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in files."""
        return self.shape[::-1] if self.transposed else self.unflattened or self.shape

    @property
    def key(self) -> str:
        """Identity over the whole model: a tied head and the embedding have the same key."""
        return self.sources[0]

    @property
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

    embed_scale: float = 1.0
    """What token embeddings are multiplied by, rounded to the model's dtype."""
    logit_scale: float = 1.0
    """What logits are multiplied by."""

    transposed: frozenset[str] = frozenset()
    """Modules whose matrices files store as (in, out)."""

    chunk_tokens: int = 4096
    """Tokens that a layer computes at once, which bounds what it allocates for a long prompt. Products reach
    their full rate with some hundreds of rows on a CPU (benchmarks/host_linear.py) and with some thousands on a
    GPU, so more would only take memory."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def longest_text(self) -> float:
        """Positions that can be computed: the rows of a learned table, or the shortest window of attention. Rotary
        positions have no end."""
        table = self.max_positions if self.positions == "learned" else math.inf
        return min([table, *(layer.attention.window or math.inf for layer in self.layers)])

    @property
    def projected(self) -> bool:
        return self.embed_size != self.hidden_size

    def first_layers(self, count: int) -> ModelSpec:
        """The model without its layers from number `count` on."""
        return replace(self, layers=self.layers[:count])

    def sources(self, module: str, index: int | None = None, head: int | None = None) -> tuple[str, ...]:
        """Full names of `module` (of layer `index`, of head `head`), in the order in which they are tried."""
        return tuple(name.format(i=index, h=head) for name in self.names[module])

    def by_head(self, module: str) -> bool:
        """Whether checkpoints keep a tensor of `module` for each head."""
        return any("{h}" in name for name in self.names[module])
