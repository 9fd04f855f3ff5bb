"""The headers of tensor files: safetensors and numpy files."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexgen.errors import CheckpointError, shown
from flexgen.models.plain_files import reading
from flexgen.units import align

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights that are not quantized, by the format's name."""
DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""All dtypes that can be read. The others are those of the tensors of quantized weights."""
_NUMPY_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}
_LENGTH_BYTES = 8
SHOWN_CHARACTERS = 200  # the maximum number of characters of a file's contents in a message
_HEADER_LIMIT = 100_000_000  # the published limit of the format


@dataclass(frozen=True)
class StoredTensor:
    """The metadata of a tensor in a file. `dtype` is None for a `kind` that cannot be read."""

    path: Path
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int = 0
    nbytes: int = 0


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The metadata of the tensors in a safetensors file by name.

    Raises CheckpointError if the file is not a safetensors file or is truncated.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or not 2 <= length <= min(_HEADER_LIMIT, size - _LENGTH_BYTES):
            raise CheckpointError(
                f"{path}: not a complete safetensors file: it has {size} bytes and a header of {length} bytes. Copy "
                "or download it again"
            )
        text = file.read(length)
    base = _LENGTH_BYTES + length
    tensors = {}
    try:
        for name, entry in json.loads(text, object_pairs_hook=_unique).items():
            if name == "__metadata__":
                continue
            begin, end = _whole(entry["data_offsets"])
            kind, shape = str(entry["dtype"])[:SHOWN_CHARACTERS], _whole(entry["shape"])
            if min(shape, default=0) < 0:
                raise ValueError(f"{name} has a negative dimension")
            tensors[name] = StoredTensor(path, kind, DTYPES.get(kind), shape, base + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header cannot be read: {shown(error)}") from error
    _check_extents(path, tensors, base, size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header. Raises ValueError for a duplicate name."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is duplicated")
    return values


def _whole(values: Any) -> tuple[int, ...]:
    """Offsets or a shape. Raises ValueError unless `values` is a list of integers of at most 63 bits."""
    if not isinstance(values, list) or not all(type(n) is int and abs(n) < 2**63 for n in values):
        raise ValueError(f"expected a list of integers, found {str(values)[:SHOWN_CHARACTERS]}")
    return tuple(values)


def _check_extents(path: Path, tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    """Raises CheckpointError unless the bytes of each tensor fit its shape, are in the file, and do not overlap."""
    for name, stored in tensors.items():
        end = stored.offset + stored.nbytes
        if stored.offset < base or stored.nbytes < 0 or end > size:
            raise CheckpointError(
                f"{path}: {name} is at bytes {stored.offset} to {end}, but the file has {size} bytes: it is "
                "truncated or damaged. Copy or download it again"
            )
        if stored.dtype is not None and stored.nbytes != math.prod(stored.shape) * stored.dtype.itemsize:
            raise CheckpointError(
                f"{path}: {name} of shape {stored.shape} in {stored.kind} cannot have {stored.nbytes} bytes: the "
                "file is damaged. Copy or download it again"
            )
    filled = sorted((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items() if t.nbytes)
    for (_, end, name), (begin, _, following) in itertools.pairwise(filled):
        if begin < end:
            raise CheckpointError(
                f"{path}: {name} and {following} overlap at byte {begin}: the file is damaged. Copy or download it "
                "again"
            )


def read_numpy_header(path: Path) -> StoredTensor:
    """The metadata of a numpy file. Raises CheckpointError if the array is not C-ordered or not complete."""
    with reading(path), path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read(file)
        except Exception as error:  # numpy evaluates text from the file, which can raise anything
            raise CheckpointError(f"{path}: not a numpy file: {str(error)[:SHOWN_CHARACTERS]}") from error
        offset = file.tell()
    nbytes, size = math.prod(shape) * dtype.itemsize, path.stat().st_size
    if fortran_order:
        raise CheckpointError(f"{path}: the array is in Fortran order; save it with np.ascontiguousarray")
    if offset + nbytes != size:
        raise CheckpointError(
            f"{path}: an array of shape {shape} in {dtype} needs {offset + nbytes} bytes, but the file has {size}: "
            "it is truncated or damaged. Copy or convert it again"
        )
    return StoredTensor(path, str(dtype), _NUMPY_DTYPES.get(dtype.str), shape, offset, nbytes)


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], alignment: int
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file with these tensors, one after another, and the offset of each in the file.

    The offset of the first tensor is a multiple of `alignment`. Raises KeyError for an unsupported dtype.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    entries, offsets, end = {}, {}, 0
    for name, (dtype, shape) in tensors.items():
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": (offsets[name], end)}
    text = json.dumps(entries).encode()
    base = align(_LENGTH_BYTES + len(text), alignment)
    text = text.ljust(base - _LENGTH_BYTES)  # the format allows spaces
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: base + offset for name, offset in offsets.items()}
