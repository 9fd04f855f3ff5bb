"""An embedding table that is stored off the compute device: gathers the rows that a cell reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from flexgen.layout.rows import (
    LookupSizes,
    RowLayout,
    gathered_table,
    lookup_sizes,
    read_rounds,
    row_parts,
    stored_row_bytes,
)
from flexgen.memory.disk import Read
from flexgen.memory.first_read import check_finite
from flexgen.memory.homes import Homes, HostRegion
from flexgen.memory.machine import Machine
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Extent


class RowTable:
    """An embedding table that is stored off the compute device."""

    def __init__(self, weight: WeightSpec, layers: Sequence[Layer], homes: Homes, machine: Machine) -> None:
        home = homes[weight]
        assert not isinstance(home, Tensor), "a table on the device is used in place"
        self.weight = weight
        self.codec = homes.placement.codec(weight)
        self._layers = layers
        self._home: HostRegion | Extent = home
        self._placement = homes.placement
        self._topology = machine.device.topology
        self._io = machine.io

    def sizes(self, tokens: int) -> LookupSizes:
        """The sizes of the buffers for a batch of `tokens` ids."""
        return lookup_sizes(self._layers, self._placement, self._topology, tokens)

    def layout(self, tokens: int) -> RowLayout:
        """The layout of the moves of the rows for a batch of `tokens` ids."""
        return RowLayout(self.weight, self._placement, self._topology, self.sizes(tokens).scratch)

    def nbytes(self, rows: int) -> int:
        """Bytes of `rows` rows in their stored form."""
        return stored_row_bytes(self.weight, self._placement, rows)

    def gather(self, rows: Tensor, target: Tensor, scratch: Tensor) -> None:
        """Write these rows as a smaller table to the first `nbytes(len(rows))` bytes of `target` (uint8).

        rows (n,) int64: ascending and unique. scratch (uint8, at least `LookupSizes.scratch`): overwritten.
        """
        there = row_parts(self.weight, self._placement, self.weight.shape[0])
        here = row_parts(self.weight, self._placement, len(rows))
        for (begin, nbytes), (place, _) in zip(there, here, strict=True):
            out = target[place : place + len(rows) * nbytes].view(len(rows), nbytes)
            if isinstance(self._home, Extent):
                self._read(rows.numpy(), self._home.offset + begin, out.numpy(), scratch)
                if self._placement.codec(self.weight) is None:
                    check_finite(out.flatten(), self._placement.dtype, self._home.path, self.weight.key)
            else:
                begin += self._home.offset
                part = self._home.buffer[begin : begin + self.weight.shape[0] * nbytes].view(-1, nbytes)
                torch.index_select(part, 0, rows, out=out)

    def _read(self, rows: np.ndarray, begin: int, out: np.ndarray, scratch: Tensor) -> None:
        """Read rows of `out.shape[1]` bytes. Row 0 begins at byte `begin` of the file."""
        assert isinstance(self._home, Extent)
        width = out.shape[1]
        offsets = begin + rows * width
        windows = np.lib.stride_tricks.sliding_window_view(scratch.numpy(), width)
        for spans in read_rounds(offsets, width, scratch.numel()):
            places = [0, *accumulate(span.end - span.start for span in spans)]
            self._io.read(
                [
                    Read(
                        self._home.path,
                        span.start,
                        scratch[begin:end],
                        needed=int(offsets[span.last - 1]) + width - span.start,
                    )
                    for span, (begin, end) in zip(spans, pairwise(places), strict=True)
                ]
            )
            for span, place in zip(spans, places, strict=False):
                here = slice(span.first, span.last)
                out[here] = windows[offsets[here] - span.start + place]


def open_table(layers: Sequence[Layer], homes: Homes, machine: Machine) -> RowTable | None:
    """The first layer's table, or None if its rows are not gathered off the device."""
    weight = gathered_table(layers[0], homes.placement, machine.device.topology)
    return None if weight is None else RowTable(weight, layers, homes, machine)
