"""The form in which a tier stores a weight: values in the dtype of the model, or the bytes of a codec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.layout.pieces import PieceSizes
from flexgen.layout.placement import Placement
from flexgen.memory.parallel_reading import read_checked, staging
from flexgen.models import WeightSpec
from flexgen.models.checkpoint import Checkpoint, Extent


@dataclass(frozen=True)
class WeightForms:
    """Reads weights of a checkpoint in the forms of a placement. `sizes`: the bytes that are read at once."""

    checkpoint: Checkpoint
    placement: Placement
    sizes: PieceSizes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        return self.placement.dtype

    def of(self, weight: WeightSpec) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype in which the tier stores the weight: its own, or those of the bytes of its codec."""
        if self.placement.codec(weight):
            return (self.placement.stored_bytes(weight),), torch.uint8
        return weight.shape, weight.dtype_in(self.dtype)

    def values_in_checkpoint(self, weight: WeightSpec) -> Extent | None:
        """The extent of the weight in a file of the checkpoint that stores it in the dtype of the model, or None."""
        return values_in_checkpoint(self.checkpoint, weight, self.dtype)

    def in_checkpoint(self, weight: WeightSpec) -> Extent | None:
        """The extent of the weight in a file of the checkpoint that stores it in its form, or None."""
        return None if self.placement.codec(weight) else self.values_in_checkpoint(weight)

    def pieces(self, weight: WeightSpec) -> Iterator[tuple[int, Tensor]]:
        """The bytes that the tier stores for the weight, in pieces: the offset of each piece, and the piece (uint8).

        A piece is read and encoded from a few rows at a time, so that a large vocabulary is never in memory in both
        forms. A matrix that files store as (in, out) or quantized is one piece. The bytes between the pieces are
        zero.
        """
        whole = self.checkpoint.encoded(weight) or weight.transposed  # every read takes all of it
        ranges = [range(weight.shape[0])] if whole else self.row_ranges(weight, self.sizes.read_bytes)
        width = weight.nbytes(self.dtype) // weight.shape[0]
        for rows in ranges:
            tensor = self.checkpoint.read(weight, self.dtype, rows)
            if self.placement.codec(weight) is None:
                yield rows.start * width, tensor.flatten().view(torch.uint8)
            else:
                yield from self._encoded(weight, rows.start, tensor)

    def row_ranges(self, weight: WeightSpec, nbytes: int) -> Iterator[range]:
        """All rows of a weight, in ranges of about `nbytes` in the dtype of the model."""
        count, width = weight.shape[0], weight.nbytes(self.dtype) // weight.shape[0]
        step = max(nbytes // width, 1)
        return (range(first, min(first + step, count)) for first in range(0, count, step))

    def read_rows(self, weight: WeightSpec, values: Extent, rows: range, out: Tensor) -> None:
        """Read some rows of a weight from its values in a file, and write them to their place in `out` in its form.

        out: uint8 in host memory, from the begin of the weight on.
        """
        width = values.nbytes // weight.shape[0]
        begin, nbytes = rows.start * width, len(rows) * width
        if self.placement.codec(weight) is None:
            read_checked(values, weight.key, begin, out[begin : begin + nbytes])
            return
        buffer = staging(nbytes)
        read_checked(values, weight.key, begin, buffer)
        tensor = buffer.view(values.dtype).view(len(rows), *weight.shape[1:])
        for place, piece in self._encoded(weight, rows.start, tensor):
            out[place : place + piece.nbytes].copy_(piece)

    def _encoded(self, weight: WeightSpec, first: int, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The bytes of the rows of `tensor`, which are rows of the weight from `first` on, in the weight's codec: the
        offset in the encoded weight of each piece, and the piece (uint8)."""
        codec = self.placement.codec(weight)
        assert codec is not None
        encoded = codec.encode(tensor)
        # The rows of each of the codec's parts are contiguous.
        for (place, row), (begin, _) in zip(codec.rows(weight.shape), codec.rows(tensor.shape), strict=True):
            yield place + first * row, encoded[begin : begin + len(tensor) * row]


def values_in_checkpoint(checkpoint: Checkpoint, weight: WeightSpec, dtype: torch.dtype) -> Extent | None:
    """The extent of the weight in a file of the checkpoint that stores it in the dtype that a model of the dtype
    `dtype` needs, or None."""
    extent, dtype = checkpoint.extent(weight), weight.dtype_in(dtype)
    # torch cannot view data at an odd offset as its dtype. Writers align it, but the format does not require that.
    return extent if extent and extent.dtype == dtype and extent.offset % dtype.itemsize == 0 else None
