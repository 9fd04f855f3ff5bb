"""The tier of each weight, and the codec with which it is stored there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flexgen.models import Layer, ModelSpec, WeightSpec
from flexgen.models.spec import EncodedWeight
from flexgen.policy import STORED, Split, Tier
from flexgen.quant import Codec, MatrixCodec, Stored, codec_for


@dataclass(frozen=True, eq=False)
class Placement:
    """The tier and codec of every weight by its key, and the bytes on each tier. Compared by identity, so that
    derived results can be cached.

    A weight in `stored` keeps the tensors in which the checkpoint stores it. `nbytes` counts stored bytes, after
    encoding. `share` is the share of the model in `dtype`, as in the percentages of a policy.
    """

    dtype: torch.dtype
    tiers: dict[str, Tier]
    codecs: dict[str, Codec]
    stored: dict[str, EncodedWeight]
    nbytes: dict[Tier, int]
    share: dict[Tier, int]

    def of(self, weight: WeightSpec) -> Tier:
        return self.tiers[weight.key]

    def codec(self, weight: WeightSpec) -> Codec | None:
        """The codec that encodes the weight."""
        return self.codecs.get(weight.key)

    def decoder(self, weight: WeightSpec) -> MatrixCodec[Any] | None:
        """The codec that decodes the weight: `codec`, or that of the encoding in which the checkpoint stores it."""
        stored = self.stored.get(weight.key)
        return Stored(stored.encoding) if stored else self.codec(weight)

    def parts(self, weight: WeightSpec) -> tuple[WeightSpec, ...]:
        """The tensors that are stored and moved for the weight: itself, or those of the checkpoint."""
        stored = self.stored.get(weight.key)
        return stored.parts if stored else (weight,)

    @property
    def encodes(self) -> bool:
        """Whether any weight is not stored in the model's dtype."""
        return bool(self.codecs or self.stored)

    def stored_bytes(self, weight: WeightSpec) -> int:
        """Bytes of the weight in its stored form, in which it also moves."""
        if stored := self.stored.get(weight.key):
            return sum(part.nbytes(self.dtype) for part in stored.parts)
        codec = self.codec(weight)
        return codec.nbytes(weight.shape) if codec else weight.nbytes(self.dtype)

    @property
    def percent(self) -> dict[Tier, float]:
        """The achieved percentage of the model on each tier."""
        total = sum(self.share.values())
        return {tier: 100 * count / total if total else 0.0 for tier, count in self.share.items()}


def place_weights(layers: Sequence[Layer], split: Split, dtype: torch.dtype) -> Placement:
    """Assign whole units to tiers, so that the model's percentages are as close to `split` as units allow.

    A unit is a tensor, or all tensors of an expert. Each unit goes to the tier that is furthest below its share of
    all bytes placed so far. The rounding error of one layer is thus carried to the next, every layer moves about the
    same bytes, and each tier ends within one unit of its share. A tied head is the embedding's tensor, which counts
    once.
    The units of the last layer are placed first: each goes to the fastest tier whose share has room for half of it or
    more. Orders with overlap have a slot for this layer alone (`Turns`). So on another tier than the device's, its
    weights would take as much device memory, and they would be loaded in each pass. Units that are larger than any
    layer, such as a large vocabulary, are placed first too, because they would determine the size of their slot.
    A tier's codec is used for the tensors that it fits: all matrices except the table of positions. The codec
    "stored" keeps the matrices that the checkpoint stores quantized in that form, except for tables.
    """
    placement = Placement(dtype, {}, {}, {}, dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0))
    placed = placement.share
    units: dict[str, _Unit] = {}
    for layer in layers:
        for weights in layer.units:
            if weights[0].key not in units:
                nbytes = sum(weight.nbytes(dtype) for weight in weights)
                units[weights[0].key] = _Unit(layer.spec, weights, nbytes)
    whole = sum(unit.nbytes for unit in units.values())
    shares = {tier: whole * split.percent(tier) / 100 for tier in Tier if split.percent(tier) > 0}
    between = max((layer.weight_bytes(dtype) for layer in layers[1:-1]), default=0)
    ends = {weights[0].key for weights in layers[-1].units}
    for key, unit in list(units.items()):
        if key in ends or between < unit.nbytes:
            room = (tier for tier in shares if 2 * (shares[tier] - placed[tier]) >= unit.nbytes)
            if tier := next(room, None):
                _place(placement, units.pop(key), tier, split[tier].codec)
    rest = {tier: max(share - placed[tier], 0.0) for tier, share in shares.items()}
    before, total, left = dict(placed), 0, sum(rest.values()) or 1.0
    for unit in units.values():
        total += unit.nbytes
        behind = {tier: total * share / left - placed[tier] + before[tier] for tier, share in rest.items()}
        tier = max(behind, key=behind.__getitem__)
        _place(placement, unit, tier, split[tier].codec)
    return placement


class _Unit(NamedTuple):
    spec: ModelSpec
    weights: Sequence[WeightSpec]
    nbytes: int


def _place(placement: Placement, unit: _Unit, tier: Tier, name: str) -> None:
    """Add a unit to a tier, in the codec `name`."""
    placement.share[tier] += unit.nbytes
    placement.tiers.update((weight.key, tier) for weight in unit.weights)
    if name == "none":  # a shortcut, because a search places tens of thousands of experts often
        placement.nbytes[tier] += unit.nbytes
        return
    for weight in unit.weights:
        codec = codec_for(name, weight.shape)
        if codec and weight.encodable:
            placement.codecs[weight.key] = codec
        encoded = unit.spec.encoded.get(weight.key)
        if encoded and name == STORED and weight.encodable and not weight.looked_up:
            placement.stored[weight.key] = encoded
            placement.tiers.update(dict.fromkeys((part.key for part in encoded.parts), tier))
        placement.nbytes[tier] += placement.stored_bytes(weight)
