"""Random weights of the right shapes, for benchmarks and plans without a download."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexgen.formats import Encoding
from flexgen.kernels.e4m3 import E4M3
from flexgen.kernels.encoded_linear import Code
from flexgen.models.layer import Layer
from flexgen.models.published import published
from flexgen.models.spec import EncodedWeight, WeightSpec

_STD = 0.02
# A prime, so that no row length divides it and the rows of a matrix do not repeat.
_POOL = 262_139


_CODES_STD = {Code.INT4: 4.6, Code.INT8: 74.0, Code.E2M1: 2.9, Code.E4M3: 1.0}
"""The standard deviation of random codes: all integers and e2m1 alike, and normal e4m3."""
_ANY_SHAPE = (1024, 1024)
"""A shape that every encoding stores."""


@functools.lru_cache(maxsize=8)
def _pool(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if not dtype.is_floating_point:
        return torch.randint(256, (_POOL * dtype.itemsize,), generator=generator).to(torch.uint8).view(dtype)
    return (torch.randn(_POOL, generator=generator) * (1 if dtype is E4M3 else _STD)).to(dtype)


class DummyCheckpoint:
    """Random weights that depend only on the weight's key: normal with standard deviation 0.02; norm scales are 1.

    The values are copied from one fixed pool, so even a model of tens of GB is generated at the speed of a copy.
    With `encodings`, the matrices that releases usually quantize also exist in the first of these encodings: random
    codes, and scales that are all the same. Their values are not those of the plain matrix.
    """

    def __init__(self, directory: Path | None = None, encodings: Sequence[Encoding] = ()) -> None:
        self.directory = directory
        self._encodings = encodings

    sources: Sequence[Path] = ()
    """There are no files."""

    identity = f"dummy {_STD} {_POOL}"
    """With the key and shape of a weight, it identifies the values."""

    fingerprint = identity

    def encoded(self, weight: WeightSpec) -> EncodedWeight | None:
        """The tensors of a weight that releases usually quantize; None for other weights."""
        return published(weight, self._encodings)

    def _scale(self, weight: WeightSpec) -> float | None:
        """The value of all scales in a tensor of a quantized weight; None for codes and zero points."""
        if not weight.quantized or weight.dtype is None or not weight.dtype.is_floating_point:
            return None
        encoding = self._encodings[0]
        suffixes = [part.suffix for part in encoding.parts(_ANY_SHAPE)]
        position = next(n for n, suffix in enumerate(suffixes) if weight.name.endswith(suffix))
        scale = _STD / _CODES_STD[encoding.form.code]
        if position == 0:
            return None
        if position == 2:  # of the whole matrix
            return 1 / scale if encoding.form.divides else scale
        return 1.0 if weight.dtype is E4M3 else scale

    def extent(self, weight: WeightSpec) -> None:
        """Always None: there is no file."""

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`. The same weight always has the same values, rounded to the dtype."""
        dtype = weight.dtype_in(dtype)
        rows = range(weight.shape[0]) if rows is None else rows
        shape = (len(rows), *weight.shape[1:])
        if weight.name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        if (scale := self._scale(weight)) is not None:
            return torch.full(shape, scale).to(dtype)
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
