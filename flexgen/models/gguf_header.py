"""The header of a GGUF file: its metadata, and the place of each tensor.

The reader of the package gguf makes several objects for each token of the vocabulary. For 150 000 tokens, that takes
11 seconds and half a gigabyte. It also does not check the length of the file. This reader skips the vocabulary.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flexgen.errors import CheckpointError, shown
from flexgen.models.folders import SHARD
from flexgen.models.headers import StoredTensor
from flexgen.models.plain_files import reading
from flexgen.models.tensor_files import by_name
from flexgen.units import align

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of metadata, as codes of the module struct."""
_STRING, _ARRAY = 8, 9
_KEPT = 1 << 16
"""The longest array that is kept. Only those of the vocabulary are longer."""
_LONGEST_STRING = 1 << 26
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUFHeader:
    """values: the metadata without vocabularies and other arrays of strings. tensors: row-major shapes."""

    values: dict[str, Any]
    tensors: dict[str, StoredTensor]


def package() -> Any:
    """The package gguf. Raises CheckpointError if it is not installed."""
    try:
        import gguf  # an optional dependency
    except ImportError as error:
        raise CheckpointError(
            "GGUF files need the package gguf, which is not installed: pip install 'flexgen[gguf]'"
        ) from error
    return gguf


def all_shards(path: Path) -> list[Path]:
    """The files of a model, of which `path` is one. Raises CheckpointError if one is missing."""
    if not (match := SHARD.fullmatch(path.name)):
        return [path]
    count = int(match["count"])
    paths = [
        path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [each.name for each in paths if not each.exists() and not each.is_symlink()]
    if missing or path not in paths:
        raise CheckpointError(
            f"{path.parent}: the model is in {count} files, and {', '.join(missing[:8])} is missing. Download it "
            "again"
        )
    return paths


def read_headers(paths: list[Path]) -> GGUFHeader:
    """The header of a model in one or more files. Raises CheckpointError."""
    headers = [read_gguf_header(path) for path in paths]
    tensors = by_name(item for header in headers for item in header.tensors.items())
    return GGUFHeader(headers[0].values, tensors)


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header of one file. Raises CheckpointError if it is damaged, truncated or of an unknown version."""
    gguf = package()
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(path, file, size)
        if (magic := file.read(4)) != _MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file: it starts with {magic!r}")
        if (version := reader.number("I")) not in _VERSIONS:
            raise CheckpointError(
                f"{path}: version {version} of GGUF is not supported; supported: 2 and 3 in little-endian order. "
                "Download a newer file of the model"
            )
        count, keys = reader.number("Q"), reader.number("Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = reader.string()
            values[name] = reader.value(reader.number("I"))
        entries = [reader.tensor() for _ in range(count)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment = {shown(alignment)} is not a size")
        base = align(file.tell(), alignment)
    found = []
    for name, shape, number, offset in entries:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {shown(name)} has the type {number}, which the installed version of the package gguf does "
                "not know. Upgrade it, or download the model as Q8_0 or Q4_K_M"
            ) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_bytes
        if (shape[-1] if shape else 1) % block or base + offset + nbytes > size:
            raise CheckpointError(
                f"{path}: {shown(name)} of shape {shape} in {kind.name} is at bytes {base + offset} to "
                f"{base + offset + nbytes}, but the file has {size} bytes: it is truncated or damaged. Download it "
                "again"
            )
        stored = StoredTensor(path, kind.name, _PLAIN.get(kind.name), shape, base + offset, nbytes)
        found.append((name, stored))
    return GGUFHeader(values, by_name(found))


class _Reader:
    """Reads the parts of a header. Raises CheckpointError at the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: its GGUF header cannot be read: {reason}. The file is truncated or damaged; download it "
            "again"
        )

    def _take(self, nbytes: int) -> bytes:
        data = self._file.read(nbytes) if nbytes <= self._size else b""
        if len(data) < nbytes:
            raise self._damaged(f"it ends after {self._size} bytes")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _bytes(self) -> bytes:
        if (length := self.number("Q")) > _LONGEST_STRING:
            raise self._damaged(f"a string has {length} bytes")
        return self._take(length)

    def string(self) -> str:
        try:
            return self._bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a name is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A value of metadata; an array as a tuple; None for an array of strings and for one that is not kept."""
        if kind == _STRING:
            return self._bytes().decode("utf-8", "replace")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._damaged(f"a value has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            data = self._take(count * struct.calcsize(code))
            return struct.unpack(f"<{count}{code}", data) if count <= _KEPT else None
        if kind != _STRING:
            raise self._damaged(f"an array has values of the unsupported type {kind}")
        for _ in range(count):
            self._bytes()
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of a tensor."""
        name, dimensions = self.string(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"{shown(name)} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if any(size >= 2**40 for size in shape):
            raise self._damaged(f"{shown(name)} has the shape {shape}")
        return name, shape, self.number("I"), self.number("Q")
