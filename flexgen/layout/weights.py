"""The moves of a layer's weights that are not stored on the compute device, for each visit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexgen.layout.moves import Kind, Move, Range, Route, Routes, cut
from flexgen.layout.placement import Placement
from flexgen.layout.rows import moved_tensors
from flexgen.layout.topology import Topology
from flexgen.models import Layer, WeightSpec
from flexgen.policy import Tier
from flexgen.results.trace import LaneName
from flexgen.units import ALIGNMENT, BLOCK, align


@dataclass(frozen=True)
class Run:
    """Bytes that are stored together and move together: `length` bytes, with weights from `lead` to `end`.

    The bytes outside `lead` to `end` are read only because a disk reads whole blocks.
    """

    tier: Tier
    length: int
    lead: int
    end: int


@dataclass(frozen=True)
class WeightLayout:
    """The runs of one layer, in the order in which they move."""

    runs: tuple[Run, ...]
    topology: Topology

    @property
    def nbytes(self) -> int:
        """Bytes that move for each visit of the layer."""
        return sum(run.length for run in self.runs)

    def parts(self, piece: int, pieces: int) -> list[Range]:
        """The parts of the runs that move as `piece` of `pieces`."""
        return cut([run.length for run in self.runs], piece, pieces, BLOCK)

    def load(self, piece: int, pieces: int) -> Routes:
        """The routes from home to a slot."""
        routes = []
        for tier in (Tier.CPU, Tier.DISK):
            parts = [part for part in self.parts(piece, pieces) if self.runs[part.item].tier is tier]
            if parts:
                read = sum(part.end - part.begin for part in parts)
                routes.append(self._route(tier, read, sum(map(self._payload, parts))))
        return tuple(routes)

    def _route(self, tier: Tier, read: int, payload: int) -> Route:
        moves = []
        for lane in self.topology.inward(tier):
            if lane is LaneName.DISK_READ:
                moves.append(Move(lane, read, Kind.READ))
            elif payload:
                moves.append(Move(lane, payload))
        return Route(tier, tuple(moves))

    def _payload(self, part: Range) -> int:
        run = self.runs[part.item]
        return max(min(part.end, run.end) - max(part.begin, run.lead), 0)


def weight_layouts(layers: Sequence[Layer], placement: Placement, topology: Topology) -> list[WeightLayout]:
    """The layout of each layer, which is known before anything is loaded.

    It is exact for weights in host memory. In a file, the runs consist of the weights' own bytes. A read may have up
    to two more blocks, and a checkpoint's own file may divide a run or have other tensors in between.
    """
    at_home: dict[str, tuple[str, int, int]] = {}  # by key: the layer that it is loaded with, begin, end
    for layer in layers:
        for tier in Tier:
            here = [w for w in layer.weights if placement.of(w) is tier]
            new = [part for w in here for part in placement.parts(w) if part.key not in at_home]
            offsets, _ = lay_out(new, placement)
            for weight, offset in zip(new, offsets, strict=True):
                at_home[weight.key] = layer.name, offset, offset + placement.stored_bytes(weight)
    layouts = []
    for layer in layers:
        found: dict[tuple[Tier, str], list[tuple[int, int]]] = {}
        for weight in moved_tensors(layer, placement, topology):
            tier = placement.of(weight)
            home, begin, end = at_home[weight.key]
            if not topology.in_place(tier):
                found.setdefault((tier, home), []).append((begin, end))
        runs = (_run(tier, spans) for (tier, _), spans in found.items())
        layouts.append(WeightLayout(tuple(runs), topology))
    return layouts


def _run(tier: Tier, spans: Sequence[tuple[int, int]]) -> Run:
    if tier is Tier.DISK:  # files have no padding between weights
        length = sum(end - begin for begin, end in spans)
    else:
        length = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return Run(tier, length, 0, length)


def lay_out(weights: Iterable[WeightSpec], placement: Placement) -> tuple[list[int], int]:
    """The offsets of weights that are loaded together to one buffer, and the length of the buffer, in bytes."""
    offsets, end = [], 0
    for weight in weights:
        offsets.append(end)
        end = align(end + placement.stored_bytes(weight), ALIGNMENT)
    return offsets, end


def count_pieces(layouts: Iterable[WeightLayout], batches: int) -> int:
    """The number of pieces in which a layer's weights move, so that other transfers of `batches` run in between."""
    return max(
        1, min(batches, max(layout.nbytes // layout.topology.pieces.weight_bytes for layout in layouts))
    )
