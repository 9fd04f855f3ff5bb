"""The converted weights of a layer: one file in the offload directory for those of each tier."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from flexgen.errors import CapacityError
from flexgen.memory.conversions import SUFFIX, Conversions
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.weight_forms import WeightForms
from flexgen.models import Layer, WeightSpec
from flexgen.models.checkpoint import Extent
from flexgen.models.headers import make_header, read_header
from flexgen.units import ALIGNMENT, format_bytes

logger = logging.getLogger(__name__)


class ConvertedLayers:
    """Files of weights that no file of the checkpoint stores in the form of their tier.

    The name of a file depends on the dtype, the codecs and the set of weights.
    """

    def __init__(self, forms: WeightForms, files: Conversions, disk: DiskStore) -> None:
        self._forms = forms
        self._files = files
        self._disk = disk

    def find(self, layer: Layer, weights: Sequence[WeightSpec]) -> dict[str, Extent] | None:
        """The extents, by key, in the undamaged file with these weights that an earlier run wrote, or None."""
        _, header, offsets, nbytes = self._layout(weights)
        path = self._files.find(self._name(layer, weights), header, nbytes)
        return None if path is None else self._extents(path, weights)

    def remove_stale(self) -> None:
        """Remove files of earlier states of the checkpoint (`Conversions.remove_stale`)."""
        self._files.remove_stale()

    def nbytes(self, weights: Sequence[WeightSpec]) -> int:
        """The bytes of the file."""
        return self._layout(weights)[-1]

    def write(
        self,
        layer: Layer,
        weights: Sequence[WeightSpec],
        pieces: Callable[[WeightSpec], Iterable[tuple[int, Tensor]]] | None = None,
    ) -> dict[str, Extent]:
        """Write the file, and return the extents by key.

        pieces: the bytes of a weight, like `WeightForms.pieces`, which is the default. Raises CapacityError if the
        offload directory has too little room, and RequestError if it cannot be written to.
        """
        ordered, header, offsets, nbytes = self._layout(weights)
        pieces = pieces or self._forms.pieces
        if self._disk.free < nbytes:
            raise CapacityError(
                f"weights of {layer.name} need {format_bytes(nbytes)} in the offload directory, but it has "
                f"{format_bytes(self._disk.free)} free: give another offload_dir or a smaller disk share"
            )

        def write(file: BinaryIO) -> None:
            file.write(header)
            for weight in ordered:
                for begin, piece in pieces(weight):
                    file.seek(offsets[weight.key] + begin)
                    file.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
            file.truncate(nbytes)

        path = self._files.write(self._name(layer, weights), nbytes, write)
        logger.debug("wrote %s of %s to %s", format_bytes(nbytes), layer.name, path)
        return self._extents(path, weights)

    def _extents(self, path: Path, weights: Sequence[WeightSpec]) -> dict[str, Extent]:
        entries, extents = read_header(path), {}
        for weight in weights:
            entry, dtype = entries[weight.key], weight.dtype_in(self._forms.dtype)
            extents[weight.key] = Extent(path, entry.offset, entry.nbytes, dtype, entry.shape)
        return extents

    def _layout(self, weights: Sequence[WeightSpec]) -> tuple[list[WeightSpec], bytes, dict[str, int], int]:
        """The weights in the order of the file, its header, the offset of each weight, and the bytes of the file."""
        # Encoded weights come first: their size is a multiple of the alignment of their parts. The others follow by
        # the sizes of their values, so that each begins at a multiple of it.
        ordered = sorted(weights, key=self._order)
        forms = {weight.key: self._forms.of(weight)[::-1] for weight in ordered}
        header, offsets = make_header(forms, ALIGNMENT)
        stored_bytes = self._forms.placement.stored_bytes
        return ordered, header, offsets, max(offsets[w.key] + stored_bytes(w) for w in ordered)

    def _order(self, weight: WeightSpec) -> tuple[bool, int]:
        forms = self._forms
        return forms.placement.codec(weight) is None, -weight.dtype_in(forms.dtype).itemsize

    def _name(self, layer: Layer, weights: Sequence[WeightSpec]) -> str:
        codec, parts = self._forms.placement.codec, [str(self._forms.dtype)]
        parts += [f"{weight.key} {weight.shape} {codec(weight)}" for weight in weights]
        return f"{layer.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}{SUFFIX}"
