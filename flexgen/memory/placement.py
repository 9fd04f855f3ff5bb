"""Which tier each weight lives on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexgen.models import Layer, WeightSpec
from flexgen.policy import Split, Tier


@dataclass(frozen=True)
class Placement:
    """The tier of every weight by its key, and the bytes that each tier got."""

    tiers: dict[str, Tier]
    nbytes: dict[Tier, int]

    def of(self, weight: WeightSpec) -> Tier:
        return self.tiers[weight.key]

    @property
    def percent(self) -> dict[Tier, float]:
        """Achieved percent of the model's bytes by tier."""
        total = sum(self.nbytes.values())
        return {tier: 100 * count / total if total else 0.0 for tier, count in self.nbytes.items()}


def place_weights(layers: Sequence[Layer], split: Split, dtype: torch.dtype) -> Placement:
    """Whole tensors to tiers, so that the model's percentages come as close to `split` as tensors allow.

    Each tensor goes to the tier that is furthest behind its share of all bytes placed so far. What one
    layer is rounded by is thus carried to the next, every layer streams about the same bytes, and no tier
    ends further from its share than one tensor. A tied head is the embedding's tensor: it counts once.
    """
    tiers: dict[str, Tier] = {}
    placed = dict.fromkeys(Tier, 0)
    for layer in layers:
        # Large tensors first: the small ones then even out what is left.
        for weight in sorted(layer.weights, key=lambda w: -w.numel):
            if weight.key in tiers:
                continue
            total = sum(placed.values()) + weight.nbytes(dtype)
            wanted = {tier: total * split.percent(tier) / 100 for tier in Tier if split.percent(tier) > 0}
            tier = max(wanted, key=lambda t: wanted[t] - placed[t])
            tiers[weight.key] = tier
            placed[tier] += weight.nbytes(dtype)
    return Placement(tiers, placed)
