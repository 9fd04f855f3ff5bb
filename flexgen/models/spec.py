"""What a model is, as pure data: a family's function turns a configuration into a `ModelSpec`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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
class NameTable:
    """Where a family's checkpoints keep each module; `{i}` stands for the index of the layer.

    `prefixes` are tried in order before every name except `head`: checkpoints are saved from the model
    with its LM head, or from the bare decoder.
    """

    prefixes: tuple[str, ...]
    embed: str
    attention_norm: str
    q: str
    k: str
    v: str
    out: str
    mlp_norm: str
    up: str
    down: str
    final_norm: str
    head: str
    gate: str = ""
    positions: str = ""
    project_in: str = ""
    project_out: str = ""

    def sources(self, module: str, index: int | None = None) -> tuple[str, ...]:
        """Full names of the field `module` (of layer `index`), in the order in which they are tried."""
        name = getattr(self, module).format(i=index)
        return (name,) if module == "head" else tuple(prefix + name for prefix in self.prefixes)


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
    """A decoder-only transformer: sizes, the choices that tell families apart, and checkpoint names."""

    name: str
    family: str
    names: NameTable
    dtype: torch.dtype

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    """Length of a text that the model is made for: the rows of a learned table of positions, or the context that
    the scaling of rotary positions gives."""
    embed_size: int
    """Width of the token embedding and of the LM head, projected where it is not `hidden_size`."""

    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]

    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    norm_affine: bool
    pre_norm: bool
    """True: norm before attention and MLP. False: after the residual add (opt-350m)."""
    final_norm: bool

    activation: str
    gated_mlp: bool

    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_bias: bool
    tied_head: bool

    positions: Literal["learned", "rope"]
    position_offset: int = 0
    """Rows of a learned position table that come before position 0."""
    rope: RopeSpec | None = None

    chunk_tokens: int = 4096
    """Tokens that a layer computes at once, which bounds what it allocates for a long prompt. Products reach
    their full rate with some hundreds of rows on a CPU (benchmarks/host_linear.py) and with some thousands on a
    GPU, so more would only take memory."""

    @property
    def longest_text(self) -> float:
        """Positions that can be computed: the rows of a learned table. Rotary positions have no end."""
        return self.max_positions if self.positions == "learned" else math.inf

    @property
    def projected(self) -> bool:
        return self.embed_size != self.hidden_size

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim
