"""Decode cells that a GPU replays as CUDA graphs: their layers, their lengths, and the memory that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from flexgen.kernels.attention import MASK_ALIGNMENT
from flexgen.kernels.workspaces import Workspaces
from flexgen.layout.cache_needs import BatchCache
from flexgen.layout.needs import Need
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.rows import whole_weights
from flexgen.layout.topology import Topology
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer, TransformerLayer
from flexgen.models.spec import RopeSpec
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
    on the GPU, and attention must be dense, with plain scores and without a window. All weights of the layer must be
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
        and not _masked_otherwise(layer)
        and all(
            topology.in_place(placement.of(weight)) and placement.decoder(weight) is None
            for weight in whole_weights(layer, placement, topology)
        )
    )


def _masked_otherwise(layer: Layer) -> bool:
    """Whether attention of the layer is more than that of plain scores with the mask that the graphs share."""
    if not isinstance(layer, AttentionLayer):
        return False
    own = layer.layer_spec.attention
    return own.window is not None or not own.scores.plain


def extent(length: int, capacity: int) -> int:
    """The number of positions over which a replay computes attention, for `length` tokens including the new one.

    A separate graph for each length would be captured as often as replayed. A graph for the whole capacity would read
    all of it for every token. So there are at most eight extents, which differ by at least 64 tokens: attention reads
    at most an eighth of the capacity in vain, and a graph is replayed for up to 64 tokens or more.
    """
    step = align(max(-(-capacity // _EXTENTS), _SHORTEST), MASK_ALIGNMENT)
    return min(align(length, step), capacity)


@dataclass(frozen=True)
class StepLayout:
    """The layout of the buffer from which the graphs of one batch read the data of the token.

    `hidden` (rows, 1, hidden) stores the hidden states between two layers. `mask` (rows, 1, 1, capacity) is that of
    `attend_fused`, `positions` (rows, 1) that of `Context`, `index` (1,) the position in the cache, and `factors` the
    `token_factors` of each of `ropes`.
    """

    rows: int
    hidden_size: int
    capacity: int
    dtype: torch.dtype
    ropes: tuple[RopeSpec, ...]

    @property
    def shapes(self) -> list[tuple[Shape, torch.dtype]]:
        """The shapes of hidden, mask, positions, index, and each of factors."""
        return [
            ((self.rows, 1, self.hidden_size), self.dtype),
            ((self.rows, 1, 1, align(self.capacity, MASK_ALIGNMENT)), self.dtype),
            ((self.rows, 1), torch.int64),
            ((1,), torch.int64),
            *(((self.rows, 4, 1, len(rope.inv_freq)), self.dtype) for rope in self.ropes),
        ]

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each of `shapes`, its offset and the earliest offset of the next one, in bytes."""
        sizes = (align(torch.Size(shape).numel() * dtype.itemsize, ALIGNMENT) for shape, dtype in self.shapes)
        return list(pairwise(accumulate(sizes, initial=0)))

    @property
    def nbytes(self) -> int:
        return self.places[-1][1]


def step_layout(layers: Sequence[Layer], rows: int, capacity: int, dtype: torch.dtype) -> StepLayout:
    """The layout for a batch of `rows` rows. layers: the layers that are replayed."""
    ropes = [layer.layer_spec.attention.rope for layer in layers if isinstance(layer, AttentionLayer)]
    found = tuple(dict.fromkeys(rope for rope in ropes if rope is not None))
    return StepLayout(rows, layers[0].spec.hidden_size, capacity, dtype, found)


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
    steps = (step_layout(layers, cache.rows, capacity, dtype).nbytes for cache in batches)
    graphs = len(layers) * len(batches) * _BYTES_EACH
    one = Passes(1, 0)
    temporary = max(
        layer.workspace_bytes(cache.rows, 1, capacity, dtype, workspaces) + cache.passing_bytes(one)
        for layer in layers
        for cache in batches
    )
    nbytes = sum(steps) + graphs + workspaces.captured + temporary
    return [Need(Tier.GPU, "graphs", "home", nbytes)]
