"""The weights of a layer on the compute device: in place, or in the slot into which they were loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexgen.kernels.grouped_matrices import grouped_matrices
from flexgen.layout.placement import Placement
from flexgen.layout.rows import moved_tensors, whole_weights
from flexgen.layout.weight_slots import SlotSizes, decoded_bytes, encoded_products
from flexgen.layout.weights import WeightLayout
from flexgen.memory.decoded import Decoding, DecodingRooms
from flexgen.memory.homes import Homes
from flexgen.memory.machine import Machine
from flexgen.memory.transfer import Chains
from flexgen.memory.weight_transfers import WeightTransfers
from flexgen.models import Layer, Weights, WeightSpec
from flexgen.units import ALIGNMENT, align


@dataclass(frozen=True)
class _LayerViews:
    """A layer's weights as `WeightSlots.weights` returns them, and the decodings of the encoded ones."""

    weights: Weights
    decodings: tuple[Decoding, ...]


class WeightSlots:
    """For each layer, the work that loads it into a slot, and its tensors in the slot.

    The object has no reference cycles: its slots and weights are freed with the last outside reference, without
    Python's garbage collector.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        homes: Homes,
        sizes: SlotSizes,
        placement: Placement,
        machine: Machine,
        decoded: int = 1,
    ) -> None:
        """decoded: the number of layers that are computed alternately, each with its own decoded weights."""
        self.turns = sizes.turns
        self._homes = homes
        self.placement = placement
        topology = machine.device.topology
        self._layers = [whole_weights(layer, placement, topology) for layer in layers]
        moved = [moved_tensors(layer, placement, topology) for layer in layers]
        self._transfers = WeightTransfers(moved, homes, sizes, placement, machine)
        self._groups = [layer.groups for layer in layers]
        self._products = [encoded_products(layer, placement) for layer in layers]
        # Room for any layer except the last one, which computes so few tokens that it usually decodes nothing.
        nbytes = [decoded_bytes(layer, placement) for layer in layers]
        usual = max(nbytes[:-1], default=0)
        self._room_bytes = [max(usual, own) for own in nbytes]
        self._rooms = DecodingRooms(machine.device.memory, decoded)
        self._views: dict[tuple[int, int, int], _LayerViews] = {}

    @property
    def layouts(self) -> Sequence[WeightLayout]:
        """The layout of each layer's moves in each visit."""
        return self._transfers.layouts

    def chains(self, layer: int, slot: int, piece: int, pieces: int) -> Chains:
        """The work that loads `piece` of `pieces` of the layer into the slot. Made once and used for every visit."""
        return self._transfers.chains(layer, slot, piece, pieces)

    def weights(self, layer: int, slot: int, visit: object) -> Weights:
        """The layer's weights on the compute device, by name. Loaded weights are views of the slot. The result does
        not include a table whose rows are gathered off the device.

        A weight is a tensor, or a `QuantizedMatrix` if it is encoded. A product with many rows decodes the matrix as
        part of the computation, once per `visit` of the layer: the batches of a visit share the result.
        """
        decodes = bool(self._products[layer])
        room = self._rooms.number(visit) if decodes else 0
        key = (layer, slot, room)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._view(*key)
        if decodes:
            self._rooms[room].serve(visit, views.decodings)
        return views.weights

    def release_decoded(self) -> None:
        """Release the memory of decoded matrices. Call it only while nothing computes."""
        self._rooms.close()

    def _view(self, layer: int, slot: int, room: int) -> _LayerViews:
        stored = {weight.key: tensor for weight, tensor in self._transfers.arrived(layer, slot)}
        weights: dict[str, Any] = {}
        dtype, decodings, end = self.placement.dtype, [], 0
        multiplied = {weight.name for weight in self._products[layer]}
        for weight in self._layers[layer]:
            parts = [self._tensor(part, stored) for part in self.placement.parts(weight)]
            if codec := self.placement.decoder(weight):
                # Rows of a table are read in their stored form: the decoding is never used.
                make = partial(torch.empty, weight.shape, dtype=dtype)
                if weight.name in multiplied:
                    place = self._rooms[room].place
                    make = partial(place, self._room_bytes[layer], end, weight.shape, dtype)
                    end = align(end + weight.nbytes(dtype), ALIGNMENT)
                encoded = parts if weight.key in self.placement.stored else parts[0]
                decodings.append(Decoding(codec, encoded, make))
                weights[weight.name] = codec.matrix(encoded, weight.shape, dtype, decodings[-1])
            else:
                (weights[weight.name],) = parts
        for name, matrices, biases in self._groups[layer]:
            own_biases = [weights[each] for each in biases] or None
            group = grouped_matrices([weights[each] for each in matrices], own_biases, dtype)
            if group is not None:
                weights[name] = group
        return _LayerViews(weights, tuple(decodings))

    def _tensor(self, weight: WeightSpec, arrived: Mapping[str, Tensor]) -> Tensor:
        """The tensor of a weight on the compute device, in its stored form."""
        home = self._homes[weight]
        return home if isinstance(home, Tensor) else arrived[weight.key]
