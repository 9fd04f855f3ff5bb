"""The sizes of the weight slots, for buffers, plan and placement.

The layers of a model have different sizes: the vocabulary may be ten times as large as any other layer. The slot of
each layer is known (`Turns`), so a slot is only as large as the layers that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from flexgen.layout.placement import Placement
from flexgen.layout.rows import moved_tensors
from flexgen.layout.topology import Topology
from flexgen.models import Layer, WeightSpec
from flexgen.policy import Tier
from flexgen.schedule.turns import Turns
from flexgen.units import ALIGNMENT, BLOCK, align

GAP = 4 * BLOCK
"""The maximum gap in bytes between two weights of a file that one read covers."""


@dataclass(frozen=True)
class SlotSizes:
    """Upper bounds in bytes of the buffers of each slot, which are known before anything is loaded.

    `device`: the slot itself. `staging`: its staging buffer in host memory.
    """

    turns: Turns
    device: tuple[int, ...]
    staging: tuple[int, ...]


def slot_sizes(
    layers: Sequence[Layer], placement: Placement, topology: Topology, slots: int, ends: bool = True
) -> SlotSizes:
    """The sizes of `slots` slots, which the layers use in turn: each slot is large enough for all of its layers.

    On a device that computes in host memory, only disk weights move, directly to the slot. On other devices, they
    pass through a staging buffer in host memory. A table whose rows are gathered at home never moves as a whole.
    Without `ends`, the sizes exclude the first layer and the last one.
    """
    return _slot_sizes(tuple(layers), placement, topology, slots, ends)


@lru_cache(maxsize=128)  # a policy search plans many policies with the same placement of weights
def _slot_sizes(
    layers: tuple[Layer, ...], placement: Placement, topology: Topology, slots: int, ends: bool
) -> SlotSizes:
    from_disk, arriving = [], []
    for layer in layers:
        moved = dict.fromkeys(Tier, 0)
        for weight in moved_tensors(layer, placement, topology):
            moved[placement.of(weight)] += align(placement.stored_bytes(weight), ALIGNMENT) + GAP + 2 * BLOCK
        from_disk.append(moved[Tier.DISK])
        arriving.append(sum(n for tier, n in moved.items() if not topology.in_place(tier)))
    turns = Turns(len(layers), slots)
    counted = range(len(layers)) if ends else range(1, len(layers) - 1)
    served = [[layer for layer in turns.served(slot) if layer in counted] for slot in range(turns.count)]

    def largest(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(max((sizes[layer] for layer in some), default=0) for some in served)

    staged = [0] * len(layers) if topology.shares_host_memory else from_disk
    return SlotSizes(turns, largest(arriving), largest(staged))


def encoded_products(layer: Layer, placement: Placement) -> list[WeightSpec]:
    """Encoded weights that the layer multiplies with. Not a table, whose rows are read in their stored form."""
    if not placement.encodes:
        return []
    return [weight for weight in layer.weights if weight is not layer.table and placement.decoder(weight)]


def decoded_bytes(layer: Layer, placement: Placement) -> int:
    """Bytes of the layer's encoded matrices in the model's dtype."""
    return sum(align(w.nbytes(placement.dtype), ALIGNMENT) for w in encoded_products(layer, placement))


def decoding_bytes(layers: Sequence[Layer], placement: Placement) -> int:
    """Temporary bytes to decode the largest encoded matrix of all layers on a GPU, in addition to the result."""
    if not placement.encodes:
        return 0
    encoded = (
        (placement.decoder(w), w.shape) for layer in layers for w in encoded_products(layer, placement)
    )
    return max((codec.decode_workspace(shape) for codec, shape in encoded if codec), default=0)


def decodes(layer: Layer, placement: Placement, tokens: int, topology: Topology) -> bool:
    """Whether the layer may decode matrices to compute `tokens` tokens. A codec with a fused kernel does not decode
    for few rows."""
    codecs = {placement.decoder(weight) for weight in encoded_products(layer, placement)}
    on_host, dtype = topology.shares_host_memory, placement.dtype
    return any(codec and tokens > codec.certain_fused_rows(on_host, dtype) for codec in codecs)
