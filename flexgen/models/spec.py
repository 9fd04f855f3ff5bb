"""The description of a model as plain data. A family's `to_spec` converts a config to a `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from flexgen.formats import Encoding
from flexgen.kernels.scoring import Window
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec
from flexgen.models.norm_spec import NormSpec as NormSpec
from flexgen.models.sources import Names, Source, Stacked


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: the angle of pair `j` at position `p` is `p * inv_freq[j]`.

    The first 2 * len(inv_freq) values of a head are rotated; the others do not change. cos and sin are multiplied by
    `scaling`. Two kinds depend on the length of the sequence: beyond `original_max_positions`, `dynamic` recomputes
    the base, and `longrope` uses `long_inv_freq`.
    """

    kind: str
    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    long_inv_freq: tuple[float, ...] = ()
    interleaved: bool = False
    """True: pair `j` has the values 2j and 2j + 1. False: the values j and j + len(inv_freq)."""

    def __hash__(self) -> int:
        # Each layer looks up its factors for each token. To hash the frequencies would take longer than the rest.
        return hash((self.kind, self.scaling, self.theta, self.factor, self.interleaved))


@dataclass(frozen=True)
class LayerNorms:
    """The norms of a layer: before and after attention, before and after the MLP. None: no norm.

    A norm after attention or MLP comes before the residual connection, or after it if `LayerSpec.residual` is "post".
    """

    attention_in: NormSpec | None = None
    attention_out: NormSpec | None = None
    mlp_in: NormSpec | None = None
    mlp_out: NormSpec | None = None


@dataclass(frozen=True)
class QKNormSpec:
    """A norm of queries and keys, before or after the rotation.

    over: "head" normalises each head with the same weight; "each" normalises each head with its own weight; "all"
    normalises all heads together.
    """

    norm: NormSpec
    over: Literal["head", "all", "each"] = "head"
    after_rope: bool = False


@dataclass(frozen=True)
class QueryScaling:
    """Queries at position `p` are multiplied by 1 + beta * log(1 + floor((p + offset) / length))."""

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True)
class ValueSpec:
    """How the values of attention are made.

    from_keys: the values are the keys before their norm and rotation, and there is no projection of values. norm: the
    norm of each head, which has no weight. scale: the factor of the values. dim: the size of a head, at most that of
    the keys (None). The cache stores narrower values with zeros behind them, because the keys and values of a page
    have one shape.
    """

    from_keys: bool = False
    norm: NormSpec | None = None
    scale: float = 1.0
    dim: int | None = None


@dataclass(frozen=True)
class ScoreSpec:
    """The steps from the products of queries and keys to their softmax.

    scale: the factor of the products; None for head_dim ** -0.5. by_position: another factor of queries. cap: scores
    are limited to this size, cap * tanh(score / cap). alibi: the slope of each head; slope * (key position - query
    position) is added to a score. sinks: whether each head has a learned score ("sinks") that takes part in the
    softmax but has no value.
    """

    scale: float | None = None
    by_position: QueryScaling | None = None
    cap: float | None = None
    alibi: tuple[float, ...] = ()
    sinks: bool = False

    @property
    def plain(self) -> bool:
        """Whether the scores are only scaled."""
        return self.cap is None and not self.alibi and not self.sinks


class CacheShape(NamedTuple):
    """The cache of a layer for one token: a key and a value of `head_dim` values for each of `kv_heads` heads.

    window: the tokens that a query attends to. None: all tokens up to itself.
    """

    kv_heads: int
    head_dim: int
    window: Window | None = None


QKVForm = Literal["separate", "rows", "heads", "groups", "mp4"]
"""The form of the query, key and value projections in checkpoints and in products.

"separate" is three matrices. All other forms are one fused matrix, whose product is split. Its rows are, for "rows":
all queries, all keys, all values; for "heads": query, key and value of each head; for "groups": queries, key and
value of each group of heads that share a key; for "mp4": four parts, each with queries, values and keys of a quarter
of the heads.
"""


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention. `heads` is a multiple of `kv_heads`. Without `rope`, queries and keys are not rotated."""

    heads: int
    kv_heads: int
    head_dim: int

    qkv: QKVForm = "separate"
    qkv_bias: bool = False
    out_bias: bool = False

    qk_norm: QKNormSpec | None = None
    rope: RopeSpec | None = None
    values: ValueSpec = ValueSpec()
    gate: bool = False
    """Whether the result of attention is multiplied by the sigmoid of a projection of the layer's input."""

    scores: ScoreSpec = ScoreSpec()
    window: Window | None = None
    """The tokens that a query attends to. None: all tokens up to itself."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """The size of a head of the values."""
        return self.values.dim or self.head_dim

    @property
    def out_size(self) -> int:
        """The width of the result of attention, before the output projection."""
        return self.heads * self.value_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.scores.scale is None else self.scores.scale

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.kv_heads, self.head_dim, self.window)


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer: its attention, its MLP or mixture of experts, their norms, and how their results join
    the hidden states.

    Two layers with equal specs have the same weight shapes, memory and cost.
    """

    attention: AttentionSpec
    mlp: MLPSpec | MixtureSpec
    norms: LayerNorms

    residual: Literal["serial", "parallel", "post"] = "serial"
    """"serial": the input of the MLP includes the output of attention. "parallel": attention and MLP have the same
    input; without `norms.mlp_in`, the MLP uses the norm of attention. "post": serial, with norms after the residual
    connections (opt-350m)."""
    residual_scale: float = 1.0
    """The factor of the outputs of attention and MLP."""
    scaled: bool = False
    """Whether the layer's output is multiplied by a stored number."""


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of one layer.

    `name` is the name inside the layer ("q.weight"). `sources` are the possible places in a checkpoint; the first one
    that exists is used.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    transposed: bool = False
    """Whether files store the matrix as (in, out). It is transposed when it is read."""
    unflattened: tuple[int, ...] = ()
    """The shape in files, if it is another shape with the same values in the same order."""
    dtype: torch.dtype | None = None
    """The dtype in which it is stored and used, if it is not the model's."""
    encodable: bool = True
    """Whether a codec may round it. The rows of a table of positions are added directly, and a router chooses."""
    unit: str = ""
    """Weights of a layer with the same unit go to the same tier: the matrices of an expert. Empty: it is alone."""
    quantized: bool = False
    """Whether it is one of the tensors that a checkpoint stores for a quantized weight."""

    @property
    def looked_up(self) -> bool:
        """Whether it is a table for lookups by index, not a matrix for products."""
        return self.name in ("embed.weight", "positions.weight")

    def shape_in(self, source: Source) -> tuple[int, ...]:
        """The shape of the tensor of one of `sources`."""
        if source.shape:
            return source.shape
        return self.shape[::-1] if self.transposed else self.unflattened or self.shape

    def dtype_in(self, model: torch.dtype) -> torch.dtype:
        """The dtype of the weight in a model of the dtype `model`."""
        return self.dtype or model

    @cached_property
    def key(self) -> str:
        """The identity of the tensor in the model. A tied head and the embedding have the same key."""
        # The first tensor of a quantized weight may have the weight's own name.
        return f"{self.sources[0]}{' (quantized)' if self.quantized else ''}"

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weight in a model of the dtype `dtype`."""
        return self.numel * self.dtype_in(dtype).itemsize


@dataclass(frozen=True)
class EncodedWeight:
    """A matrix that a checkpoint stores quantized. `parts` are its tensors, in the order of `Encoding.parts`."""

    encoding: Encoding
    parts: tuple[WeightSpec, ...]


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

    positions: Literal["learned", "attention"] = "attention"
    """"learned": a table of positions is added to the embedding. "attention": each layer's attention has its own,
    such as RoPE or ALiBi."""
    position_offset: int = 0
    """The number of rows before position 0 in a learned table of positions."""

    embed_scale: float = 1.0
    """The factor of the token embeddings. It is rounded to the model's dtype."""
    embed_norm: NormSpec | None = None
    """The norm of the embeddings."""
    logit_scale: float = 1.0
    """The factor of the logits."""
    logit_cap: float | None = None
    """Logits are limited to this size: cap * tanh(logit / cap). None: no limit."""

    transposed: frozenset[str] = frozenset()
    """The modules whose matrices are stored as (in, out) in files."""
    encodings: tuple[Encoding, ...] = ()
    """The encodings in which a quantized checkpoint stores its matrices. It may store some of them plainly."""
    encoded: Mapping[str, EncodedWeight] = field(default_factory=dict, hash=False, compare=False, repr=False)
    """The matrices that the checkpoint's files store quantized, by key."""

    chunk_tokens: int = 4096
    """The maximum number of tokens that a layer computes at once. It limits the memory for a long prompt. Products
    reach full speed with a few hundred rows on a CPU (benchmarks/host_linear.py) and a few thousand on a GPU, so more
    tokens would only use more memory."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def longest_text(self) -> float:
        """The maximum number of positions: the rows of a learned table, or infinite."""
        return self.max_positions if self.positions == "learned" else math.inf

    def stretches(self, length: int) -> bool:
        """Whether rotary frequencies, and with them the keys of all tokens, depend on the length of a text of
        `length` tokens."""
        ropes = (layer.attention.rope for layer in self.layers)
        stretched = (rope for rope in ropes if rope is not None and rope.kind in ("dynamic", "longrope"))
        return any(length > rope.original_max_positions for rope in stretched)

    @property
    def projected(self) -> bool:
        return self.embed_size != self.hidden_size

    def first_layers(self, count: int) -> ModelSpec:
        """The model with only its first `count` layers."""
        return replace(self, layers=self.layers[:count])

    def module_names(self, module: str, index: int | None = None, head: int | None = None) -> tuple[str, ...]:
        """The full names of `module` (in layer `index`, for head `head`), in the order in which they are tried."""
        return tuple(name.format(i=index, h=head) for name in self.names[module] if isinstance(name, str))

    def by_head(self, module: str) -> bool:
        """Whether checkpoints have a tensor of `module` for each head."""
        return any(isinstance(name, str) and "{h}" in name for name in self.names[module])

    def expert_sources(
        self, module: str, index: int, experts: int, stored: tuple[int, ...]
    ) -> list[tuple[Source, ...]]:
        """The places of a weight of each of the `experts` of layer `index`: tensors of its own, or parts of one.

        stored: the shape of the weight in files.
        """
        by_name = []
        for name in self.names[module]:
            if isinstance(name, Stacked):
                stacked = replace(name, name=name.name.format(i=index))
                by_name.append([stacked.source(number, experts, stored) for number in range(experts)])
            else:
                own = str(name).format(i=index, e="{e}") + ".weight"
                by_name.append([Source(own.replace("{e}", str(number))) for number in range(experts)])
        return list(zip(*by_name, strict=True))
