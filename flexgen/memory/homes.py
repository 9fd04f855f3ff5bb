"""The homes of weights: each weight is loaded to its tier once, when a model is opened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexgen.errors import CapacityError
from flexgen.layout.placement import Placement
from flexgen.memory.conversions import Conversions, converted_bytes
from flexgen.memory.converted_layers import ConvertedLayers
from flexgen.memory.known_finite import KnownFinite
from flexgen.memory.machine import Machine
from flexgen.memory.memory_loader import HostRegion, MemoryLoader, Sources
from flexgen.memory.parallel_reading import Workers
from flexgen.memory.store import Store
from flexgen.memory.weight_forms import WeightForms, values_in_checkpoint
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Checkpoint, Extent
from flexgen.policy import Tier
from flexgen.units import format_bytes

logger = logging.getLogger(__name__)

Home = Tensor | HostRegion | Extent
"""A tensor in the compute device's memory, a region of host memory, or bytes of a file.

An encoded weight is stored as the bytes of its codec in all three. Each tensor of a weight in the form of a quantized
checkpoint has a home of its own.
"""


class Homes:
    """Loads every weight to its home.

    Weights of one layer and tier are contiguous in one buffer.

    Weights on disk stay in the checkpoint's own files if these have the right dtype. Otherwise they are written once
    to the offload directory, in the same format, and later runs reuse them (`Conversions`).

    fast_start: whether weights in memory are mapped from files, if the device can (`ComputeDevice.maps_files`), and
    converted ones are written to the offload directory for later starts. If it has too little room, a warning is
    logged, and they are not written.

    Raises CheckpointError if a file cannot be read, and CapacityError if a store is too small.
    """

    def __init__(
        self, checkpoint: Checkpoint, placement: Placement, machine: Machine, fast_start: bool = False
    ) -> None:
        self.placement = placement
        self._machine = machine
        self._forms = WeightForms(checkpoint, placement, machine.device.topology.pieces)
        self._fast_start = fast_start
        self._maps = fast_start and machine.device.maps_files
        self._by_key: dict[str, Home] = {}

    def __getitem__(self, weight: WeightSpec) -> Home:
        return self._by_key[weight.key]

    def load(
        self, layers: Sequence[Layer], shown: Callable[[Sequence[Layer]], Iterable[Layer]] = iter
    ) -> None:
        """Load every weight to its home. A tied head uses the embedding's tensor, in the layout of a table.

        shown: a wrapper around the sequence of layers, such as a progress bar.
        """
        by_layer, disk = self._by_tier(layers), self._machine.disk
        conversions = Conversions(disk, layers[0].spec.name, self._forms.checkpoint)
        converted = ConvertedLayers(self._forms, conversions, disk)
        finite = self._finite(by_layer)
        sources = Sources(self._forms, converted if disk.root is not None else None, finite)
        with Workers() as workers:
            loader = MemoryLoader(sources, self._machine.device, workers, self._maps)
            self._check_disk(layers, by_layer, converted, loader)
            for layer, new in zip(shown(layers), by_layer, strict=True):
                for tier, store, on_device in self._memory():
                    self._by_key |= loader.load(layer, new[tier], store, on_device)
                self._to_disk(layer, new[Tier.DISK], converted)
        finite.keep()

    def _memory(self) -> Iterator[tuple[Tier, Store, bool]]:
        """The memory tiers with their stores, and whether these are the compute device's memory."""
        device = self._machine.device
        yield Tier.GPU, device.memory, True
        yield Tier.CPU, self._machine.host, device.shares_host_memory

    def _by_tier(self, layers: Sequence[Layer]) -> list[dict[Tier, list[WeightSpec]]]:
        """The tensors of each layer that no earlier layer has."""
        seen, found = set(self._by_key), []
        for layer in layers:
            new: dict[Tier, list[WeightSpec]] = {tier: [] for tier in Tier}
            for weight in (part for each in layer.weights for part in self.placement.parts(each)):
                if weight.key not in seen:
                    seen.add(weight.key)
                    new[self.placement.of(weight)].append(weight)
            found.append(new)
        return found

    def _finite(self, by_layer: Sequence[dict[Tier, list[WeightSpec]]]) -> KnownFinite:
        """What is known about the weights that memory tiers map from files of the checkpoint."""
        mapped = [
            extent
            for new in by_layer
            for tier, _, on_device in self._memory()
            if on_device and self._maps
            for weight in new[tier]
            if (extent := self._forms.in_checkpoint(weight))
        ]
        return KnownFinite(self._forms.checkpoint.identity, mapped)

    def _check_disk(
        self,
        layers: Sequence[Layer],
        by_layer: Sequence[dict[Tier, list[WeightSpec]]],
        converted: ConvertedLayers,
        loader: MemoryLoader,
    ) -> None:
        """Raise CapacityError if the weights to write to the disk tier exceed its limit.

        Log a warning if only those of the memory tiers exceed it, which `loader` writes for later runs otherwise.
        """
        needed = kept = 0
        for layer, new in zip(layers, by_layer, strict=True):
            elsewhere = self._elsewhere(new[Tier.DISK])
            if elsewhere and converted.find(layer, elsewhere) is None:
                needed += converted.nbytes(elsewhere)
            if self._fast_start:
                kept += sum(
                    loader.unkept_bytes(layer, new[t], on_device) for t, _, on_device in self._memory()
                )
        if not needed + kept:
            return
        converted.remove_stale()
        room = self._machine.limits()[Tier.DISK]
        if room is not None and needed > room:
            raise CapacityError(
                f"weights need {format_bytes(needed)} in the offload directory, which has {format_bytes(room)} free "
                "or allowed: the checkpoint does not store them in the dtype or codec of the policy. "
                "Give another offload_dir, a larger disk limit (max_memory), a smaller disk share, or the "
                "checkpoint's own dtype"
            )
        if room is None or needed + kept <= room:
            loader.keeps = kept > 0
        else:
            logger.warning(
                "converted weights are not kept for later starts: they need %s in the offload directory, which has "
                "%s free or allowed. Give another offload_dir, or a larger disk limit (max_memory)",
                format_bytes(kept),
                format_bytes(room - needed),
            )

    def _to_disk(self, layer: Layer, weights: Sequence[WeightSpec], converted: ConvertedLayers) -> None:
        elsewhere = self._elsewhere(weights)
        for weight in weights:
            if extent := self._forms.in_checkpoint(weight):
                self._by_key[weight.key] = extent
        if elsewhere:
            self._by_key |= converted.find(layer, elsewhere) or converted.write(layer, elsewhere)

    def _elsewhere(self, weights: Sequence[WeightSpec]) -> list[WeightSpec]:
        """The weights that no file of the checkpoint stores in the form of their tier."""
        return [weight for weight in weights if self._forms.in_checkpoint(weight) is None]


def stored_bytes(
    checkpoint: Checkpoint, layers: Sequence[Layer], dtype: torch.dtype, offload_dir: str | Path | None
) -> int:
    """Bytes of weights that the disk already stores: those in the checkpoint's files in `dtype`, and those that
    earlier runs converted to `offload_dir`."""
    weights = {weight.key: weight for layer in layers for weight in layer.weights}
    encoded = map(checkpoint.encoded, weights.values())
    parts = [part for each in encoded if each for part in each.parts]
    extents = (values_in_checkpoint(checkpoint, weight, dtype) for weight in (*weights.values(), *parts))
    stored = sum(extent.nbytes for extent in extents if extent)
    if offload_dir is not None:
        stored += converted_bytes(layers[0].spec.name, checkpoint, offload_dir)
    return stored
