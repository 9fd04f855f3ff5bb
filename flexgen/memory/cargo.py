"""Weights that are away from the compute device, as the parts in which they travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flexgen.layout.weight_slots import GAP
from flexgen.layout.weights import Run
from flexgen.memory.disk import aligned_span
from flexgen.memory.homes import Homes, HostRegion
from flexgen.models import WeightSpec
from flexgen.models.checkpoint import Extent
from flexgen.policy import Tier


@dataclass(frozen=True)
class Cargo:
    """Bytes that travel together: `source[lead:]` holds weights, each at its offset from `lead`.

    The source is host memory, or an aligned span of a file whose first `lead` bytes are only read along.
    """

    source: Tensor | tuple[Path, int]
    length: int
    lead: int
    end: int
    """Where the last weight ends, in bytes from the start of the source."""
    weights: tuple[tuple[WeightSpec, int], ...]

    @property
    def run(self) -> Run:
        tier = Tier.CPU if isinstance(self.source, Tensor) else Tier.DISK
        return Run(tier, self.length, self.lead, self.end)


def cargo_of(weights: Sequence[WeightSpec], homes: Homes) -> list[Cargo]:
    """What has to move each time the layer of these weights is visited."""
    in_host: dict[int, list[tuple[WeightSpec, HostRegion]]] = {}
    in_files: list[tuple[WeightSpec, Extent]] = []
    for weight in weights:
        home = homes[weight]
        if isinstance(home, HostRegion):
            in_host.setdefault(home.buffer.data_ptr(), []).append((weight, home))
        elif isinstance(home, Extent):
            in_files.append((weight, home))
    return [_host_cargo(found) for found in in_host.values()] + _file_cargo(in_files)


def _host_cargo(found: list[tuple[WeightSpec, HostRegion]]) -> Cargo:
    begin = min(home.offset for _, home in found)
    end = max(home.offset + home.nbytes for _, home in found)
    places = tuple((weight, home.offset - begin) for weight, home in found)
    return Cargo(found[0][1].buffer[begin:end], end - begin, 0, end - begin, places)


def _file_cargo(found: list[tuple[WeightSpec, Extent]]) -> list[Cargo]:
    found = sorted(found, key=lambda pair: (str(pair[1].path), pair[1].offset))
    runs: list[list[tuple[WeightSpec, Extent]]] = []
    for weight, extent in found:
        if runs:
            before = runs[-1][-1][1]
            if before.path == extent.path and extent.offset - (before.offset + before.nbytes) <= GAP:
                runs[-1].append((weight, extent))
                continue
        runs.append([(weight, extent)])
    cargo = []
    for run in runs:
        first, last = run[0][1], run[-1][1]
        nbytes = last.offset + last.nbytes - first.offset
        start, length, lead = aligned_span(first.offset, nbytes)
        places = tuple((weight, extent.offset - first.offset) for weight, extent in run)
        cargo.append(Cargo((first.path, start), length, lead, lead + nbytes, places))
    return cargo
