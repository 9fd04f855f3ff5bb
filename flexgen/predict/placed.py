"""Models whose weights have their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.layout.placement import Placement, place_weights
from flexgen.layout.weights import WeightLayout, weight_layouts
from flexgen.models import Layer, ModelSpec, build_layers
from flexgen.policy import Split
from flexgen.predict.arithmetic import Arithmetic, alike_layers
from flexgen.predict.hardware import Hardware
from flexgen.predict.loads import LaneTimes, Loads
from flexgen.predict.timeline import Alike


class Placements:
    """The layers of a model, and the places that policies give to their weights. Each is made once."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._spec = spec
        self._dtype = dtype
        self._layers: dict[bool, tuple[Layer, ...]] = {}
        self._placements: dict[tuple[bool, Split], Placement] = {}

    def layers(self, sep_layer: bool) -> tuple[Layer, ...]:
        if sep_layer not in self._layers:
            self._layers[sep_layer] = build_layers(self._spec, sep_layer)
        return self._layers[sep_layer]

    def placement(self, sep_layer: bool, weights: Split) -> Placement:
        key = sep_layer, weights
        if key not in self._placements:
            self._placements[key] = place_weights(self.layers(sep_layer), weights, self._dtype)
        return self._placements[key]


class PlacedModel:
    """A model with the places of its weights on a machine. The policies of a search that differ in the shares of
    cache and activations have it in common.

    `alike`: which layers take the same.
    """

    def __init__(self, layers: Sequence[Layer], placement: Placement, hardware: Hardware) -> None:
        self.layers = layers
        self.placement = placement
        self.hardware = hardware
        self.arithmetic = Arithmetic(placement, hardware)
        self.lanes = LaneTimes(hardware)
        self.layouts = weight_layouts(layers, placement, hardware.topology)
        first: dict[WeightLayout, int] = {}
        self.alike = Alike(
            [first.setdefault(layout, n) for n, layout in enumerate(self.layouts)],
            alike_layers(layers, placement, bool(hardware.packed_products)),
        )

    @property
    def last(self) -> int:
        """The number of the last layer, the head."""
        return len(self.layers) - 1

    def load_weights(self, layer: int, piece: int, pieces: int) -> Loads:
        """`piece` of `pieces` of a layer's weights, from their homes to a slot."""
        return self.lanes.loads(self.layouts[layer].load(piece, pieces))
