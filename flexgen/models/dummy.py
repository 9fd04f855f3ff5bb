"""Random weights of the right shapes, for benchmarks and plans without a download."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexgen.models.layer import Layer
from flexgen.models.spec import WeightSpec

_STD = 0.02
# A prime, so that no row length divides it and the rows of a matrix do not repeat.
_POOL = 262_139


@functools.lru_cache(maxsize=4)
def _pool(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(_POOL, generator=generator) * _STD).to(dtype)


class DummyCheckpoint:
    """Random weights that depend only on the weight's key: normal with standard deviation 0.02; norm scales are 1.

    The values are copied from one fixed pool, so even a model of tens of GB is generated at the speed of a copy.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    sources: Sequence[Path] = ()
    """There are no files."""

    identity = f"dummy {_STD} {_POOL}"
    """With the key and shape of a weight, it identifies the values."""

    fingerprint = identity

    def encoded(self, weight: WeightSpec) -> None:
        """Always None: no weight is stored quantized."""

    def extent(self, weight: WeightSpec) -> None:
        """Always None: there is no file."""

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`. The same weight always has the same values, rounded to the dtype."""
        dtype = weight.dtype_in(dtype)
        rows = range(weight.shape[0]) if rows is None else rows
        shape = (len(rows), *weight.shape[1:])
        if weight.name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        flat = torch.empty(math.prod(shape), dtype=dtype)
        # In numpy each piece is one memcpy; torch would wake its threads for each piece.
        pool, out = (tensor.view(torch.uint8).numpy() for tensor in (_pool(dtype), flat))
        first = zlib.crc32(weight.key.encode()) + rows.start * math.prod(weight.shape[1:])
        begin, done = first % _POOL * dtype.itemsize, 0
        while done < len(out):
            count = min(len(pool) - begin, len(out) - done)
            out[done : done + count] = pool[begin : begin + count]
            begin, done = 0, done + count
        return flat.view(shape)

    def verify(self, layers: Sequence[Layer]) -> None:
        """Always succeeds: no weight can be missing."""
