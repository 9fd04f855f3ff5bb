"""Decode cells that a GPU replays as CUDA graphs: their layers, their lengths, and the memory that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from flexgen.kernels.attention import MASK_ALIGNMENT
from flexgen.kernels.scoring import Window
from flexgen.kernels.workspaces import Workspaces
from flexgen.layout.cache import CacheSegment
from flexgen.layout.cache_needs import BatchCache
from flexgen.layout.needs import Need
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.rows import whole_weights
from flexgen.layout.topology import Topology
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer, TransformerLayer
from flexgen.models.spec import AttentionSpec, RopeSpec
from flexgen.policy import Policy, Tier
from flexgen.units import ALIGNMENT, align

_EXTENTS = 8
_SHORTEST = 64
_BYTES_EACH = 1024
"""Bytes of device memory that torch allocates per graph, for the seed and the offset of random numbers."""

LONGEST = 8192
"""The maximum number of cached tokens of a row for which its cells are replayed.

A graph needs attention with a mask, whose kernel computes one head of a row on one multiprocessor. Without graphs,
attention of unpadded rows divides a head among several. By estimate, at this length and with few rows, that saves as
much time as the launches of a layer take.
"""

Shape = tuple[int, ...]


def replayed(
    layers: Sequence[Layer], placement: Placement, policy: Policy, topology: Topology, workspaces: Workspaces
) -> tuple[int, ...]:
    """The numbers of the layers whose decode cells a call may replay as CUDA graphs.

    A replay repeats the same kernels at the same addresses. So all rows of the cache and of the hidden states must be
    on the GPU, and attention must be dense, with plain scores. All weights of the layer must be
    there too, without a codec, because batches share decoded weights, in buffers that layers use in turn. Mixtures of
    experts are included, but replayed only if the GPU multiplies all experts without the host (`Layer.reads_back`),
    which is known only when it computes. The embedding and the head are excluded: they are two layers of many, and
    their inputs and results differ from call to call.
    """
    resident = all(share.percent(Tier.GPU) == 100 for share in (policy.cache, policy.activations))
    if workspaces.captured is None or not resident or policy.attn_sparsity < 1:
        return ()
    return tuple(
        j
        for j, layer in enumerate(layers)
        if isinstance(layer, TransformerLayer)
        and (not isinstance(layer, AttentionLayer) or layer.layer_spec.attention.scores.plain)
        and all(
            topology.in_place(placement.of(weight)) and placement.decoder(weight) is None
            for weight in whole_weights(layer, placement, topology)
        )
    )


def extent(length: int, capacity: int) -> int:
    """The number of positions over which a replay computes attention, for `length` tokens including the new one.

    A separate graph for each length would be captured as often as replayed. A graph for the whole capacity would read
    all of it for every token. So there are at most eight extents, which differ by at least 64 tokens: attention reads
    at most an eighth of the capacity in vain, and a graph is replayed for up to 64 tokens or more.
    """
    step = align(max(-(-capacity // _EXTENTS), _SHORTEST), MASK_ALIGNMENT)
    return min(align(length, step), capacity)


@dataclass(frozen=True)
class Places:
    """The places of a layer's cached tokens in its pages. Layers with the same places and window share a mask.

    Position n is stored in place n % count. With fewer places than positions, the pages are a ring.
    """

    pages: int
    page_tokens: int
    window: Window | None

    @property
    def count(self) -> int:
        return self.pages * self.page_tokens

    def extent(self, length: int) -> int:
        """The number of places over which a replay computes attention."""
        return extent(min(length, self.count), self.count)


@dataclass(frozen=True)
class StepLayout:
    """The layout of the buffer from which the graphs of one batch read the data of the token.

    `hidden` (rows, 1, hidden) stores the hidden states between two layers, and `positions` (rows, 1) is that of
    `Context`. For each of `places`, `mask` (rows, 1, 1, count) is that of `attend_fused`, and `index` (2,) is the
    page of the token and its place in the page. `factors` is the `token_factors` of each of `ropes`.
    """

    rows: int
    hidden_size: int
    dtype: torch.dtype
    places: tuple[Places, ...]
    ropes: tuple[RopeSpec, ...]

    @property
    def shapes(self) -> list[tuple[Shape, torch.dtype]]:
        """The shapes of hidden, positions, each mask, each index, and each of factors."""
        counts = [align(own.count, MASK_ALIGNMENT) for own in self.places]
        return [
            ((self.rows, 1, self.hidden_size), self.dtype),
            ((self.rows, 1), torch.int64),
            *(((self.rows, 1, 1, count), self.dtype) for count in counts),
            *(((2,), torch.int64) for _ in counts),
            *(((self.rows, 4, 1, len(rope.inv_freq)), self.dtype) for rope in self.ropes),
        ]

    @property
    def extents(self) -> list[tuple[int, int]]:
        """For each of `shapes`, its offset and the earliest offset of the next one, in bytes."""
        sizes = (align(torch.Size(shape).numel() * dtype.itemsize, ALIGNMENT) for shape, dtype in self.shapes)
        return list(pairwise(accumulate(sizes, initial=0)))

    @property
    def nbytes(self) -> int:
        return self.extents[-1][1]


def cache_places(segment: CacheSegment, own: AttentionSpec) -> Places:
    """The places of a layer's cache with this segment for all rows."""
    return Places(segment.pages, segment.page_tokens, own.window)


def step_layout(
    layers: Sequence[Layer], segments: Mapping[AttentionSpec, CacheSegment], rows: int, dtype: torch.dtype
) -> StepLayout:
    """The layout for a batch of `rows` rows. layers: the layers that are replayed. segments: one for all rows of a
    batch, for each kind of attention."""
    attention = [layer.layer_spec.attention for layer in layers if isinstance(layer, AttentionLayer)]
    places = dict.fromkeys(cache_places(segments[own], own) for own in attention)
    ropes = dict.fromkeys(own.rope for own in attention if own.rope is not None)
    return StepLayout(rows, layers[0].spec.hidden_size, dtype, tuple(places), tuple(ropes))


def graph_needs(
    layers: Sequence[Layer],
    batches: Sequence[BatchCache],
    capacity: int,
    dtype: torch.dtype,
    workspaces: Workspaces,
) -> list[Need]:
    """The GPU memory for replays of these layers: the step buffer of each batch, and the memory that graphs share.

    Graphs keep separate memory for their temporaries. All graphs share it, because they run one after another.
    """
    if not layers or workspaces.captured is None:
        return []
    steps = (step_layout(layers, cache.whole_segments, cache.rows, dtype).nbytes for cache in batches)
    graphs = len(layers) * len(batches) * _BYTES_EACH
    one = Passes(1, 0)
    temporary = max(
        layer.workspace_bytes(cache.rows, 1, capacity, dtype, workspaces) + cache.passing_bytes(one)
        for layer in layers
        for cache in batches
    )
    nbytes = sum(steps) + graphs + workspaces.captured + temporary
    return [Need(Tier.GPU, "graphs", "home", nbytes)]
