"""Checkpoint files: the base class of all formats, and those that can be read in place (safetensors, numpy files)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import CheckpointError, shown
from flexgen.models.layer import Layer
from flexgen.models.plain_files import reading
from flexgen.models.samples import sample
from flexgen.models.sources import Source
from flexgen.models.spec import ModelSpec, WeightSpec
from flexgen.models.text_part import text_tensors
from flexgen.units import align

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMPY_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}
_LENGTH_BYTES = 8
SHOWN_CHARACTERS = 200  # the maximum number of characters of a file's contents in a message
_HEADER_LIMIT = 100_000_000  # the published limit of the format


@dataclass(frozen=True)
class Extent:
    """The place of a tensor's bytes: `nbytes` from `offset` in `path`, row-major and little-endian."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """The metadata of a tensor in a file. `kind` is the file's name of the dtype; `dtype` is None for non-floats."""

    path: Path
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int = 0
    nbytes: int = 0


_QUANTIZED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_scale": "fp8 or int8",
    "weight_scale_inv": "fp8",
    "weight_packed": "compressed-tensors",
}
"""Quantization methods by the last part of a tensor's name."""


def by_name(found: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of several files by name. Raises CheckpointError for a name that is in two files."""
    tensors: dict[str, StoredTensor] = {}
    for name, stored in found:
        if name in tensors:
            raise CheckpointError(
                f"{shown(name)} is both in {tensors[name].path} and in {stored.path}: shards of two checkpoints are "
                "mixed in this directory. Download the model again to an empty directory"
            )
        tensors[name] = stored
    return tensors


class TensorFiles:
    """The common part of all formats: a directory, and the metadata of its tensors by name.

    Of a multimodal checkpoint, it has the tensors of the text model only (`text_tensors`).
    """

    def __init__(self, directory: Path, tensors: dict[str, StoredTensor]) -> None:
        self.directory: Path | None = directory
        self._tensors = text_tensors(tensors)

    @property
    def sources(self) -> list[Path]:
        """The files of the tensors, sorted, with links resolved."""
        return sorted({tensor.path.resolve() for tensor in self._tensors.values()})

    @property
    def identity(self) -> str:
        """A key that changes when a file is replaced or modified, even if its modification time is restored."""
        found = []
        for path in self.sources:
            with reading(path):
                found.append((path, path.stat()))
        return "\n".join(f"{p} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for p, s in found)

    def holds(self, weight: WeightSpec) -> bool:
        """Whether any of the weight's sources exists."""
        return self._source(weight) is not None

    def dtype_of(self, weight: WeightSpec) -> torch.dtype:
        """The dtype of the stored weight. Raises CheckpointError if it is missing or not a float."""
        source, stored = self._find(weight)
        if stored.dtype is None:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise CheckpointError(
                f"{stored.path}: {source.name} has dtype {stored.kind}, which is not supported; "
                f"supported: {supported}"
            )
        return stored.dtype

    def check_unquantized(self) -> None:
        """Raises CheckpointError for tensors that only quantized checkpoints have, regardless of the config."""
        for name, stored in self._tensors.items():
            method = _QUANTIZED.get(name.rpartition(".")[2])
            if method or "float8" in stored.kind or stored.kind.startswith("F8"):
                raise CheckpointError(
                    f"{stored.path}: {shown(name)} ({stored.kind}) belongs to quantized weights "
                    f"({method or 'fp8'}), which are not supported. Use a checkpoint in float16, bfloat16 or "
                    "float32; a policy with the codec int4 or int8 quantizes it when it is opened"
                )

    def check_depth(self, spec: ModelSpec) -> None:
        """Raises CheckpointError if there are more layers than tensors. Call it before layers are created."""
        if spec.num_layers > len(self._tensors):
            raise CheckpointError(
                f"{self.directory}: the config has {spec.num_layers} layers, but the files contain only "
                f"{_count(list(self._tensors), 'tensor')}: they belong to different models. Download the model again"
            )

    def verify(self, layers: Sequence[Layer]) -> None:
        """Raises CheckpointError for missing tensors, wrong shapes and unsupported dtypes."""
        missing, wrong = [], []
        weights = [weight for layer in layers for weight in layer.weights]
        for weight in weights:
            source = self._source(weight)
            if source is None:
                missing.append(weight.key)
            elif self._tensors[source.name].shape != weight.shape_in(source):
                found, expected = self._tensors[source.name].shape, weight.shape_in(source)
                wrong.append(f"{source.name}: found {found}, expected {expected}")
        if missing:
            raise CheckpointError(f"{self.directory}: {_count(missing, 'tensor')} missing: {_some(missing)}")
        if wrong:
            raise CheckpointError(
                f"{self.directory}: {_count(wrong, 'tensor')} of the wrong shape: {_some(wrong)}"
            )
        for weight in weights:
            self.dtype_of(weight)

    def _source(self, weight: WeightSpec) -> Source | None:
        return next((source for source in weight.sources if source.name in self._tensors), None)

    def _find(self, weight: WeightSpec) -> tuple[Source, StoredTensor]:
        source = self._source(weight)
        if source is None:
            names = " and ".join(source.name for source in weight.sources)
            raise CheckpointError(f"{self.directory}: a tensor is missing; looked for {names}")
        return source, self._tensors[source.name]


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def _some(items: Sequence[str], limit: int = 8) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


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
    kinds = {dtype: kind for kind, dtype in DTYPES.items()} | {torch.uint8: "U8"}
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


class PlainFiles(TensorFiles):
    """Files in which each tensor is one run of bytes in row-major order. Only headers are kept in memory."""

    @property
    def fingerprint(self) -> str:
        """A digest of the name, dtype and shape of each tensor, and of samples of its values.

        It does not depend on files, paths or times: copies and other shards of the same tensors have the same one.
        """
        digest = hashlib.sha256()
        for name, stored in sorted(self._tensors.items()):
            digest.update(f"{name} {stored.kind} {stored.shape} {stored.nbytes}\n".encode())
            with reading(stored.path):
                digest.update(sample(stored.path, stored.offset, stored.nbytes))
        return digest.hexdigest()

    def extent(self, weight: WeightSpec) -> Extent | None:
        """The place of the weight's bytes; None for a transposed matrix. Raises CheckpointError if it is missing or
        not a float."""
        return None if weight.transposed else self._extent(weight)

    def _extent(self, weight: WeightSpec) -> Extent:
        """The place of the weight's bytes, transposed or not."""
        dtype, (source, stored) = self.dtype_of(weight), self._find(weight)
        offset = stored.offset + source.skipped * dtype.itemsize
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        return Extent(stored.path, offset, weight.numel * dtype.itemsize, dtype, shape)

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`. It uses plain reads, so that no file stays mapped."""
        extent, dtype = self._extent(weight), weight.dtype_in(dtype)
        if rows is not None and not weight.transposed:
            extent = _rows_of(extent, rows)
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        with reading(extent.path), extent.path.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            done = 0
            # One read returns at most 2 GiB.
            while done < extent.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{extent.path}: the file ends within {weight.key}: it has changed since it was opened. "
                        "Open the model again"
                    )
                done += count
        stored = buffer.view(extent.dtype).view(extent.shape)
        if weight.transposed:
            stored = stored.T[slice(None) if rows is None else slice(rows.start, rows.stop)].contiguous()
        return finite(stored.to(dtype), stored, extent.path, weight)


class SafetensorsCheckpoint(PlainFiles):
    """One or more safetensors files of one directory."""

    def __init__(self, directory: Path, files: Sequence[Path]) -> None:
        super().__init__(directory, by_name(item for path in files for item in read_header(path).items()))


class NumpyCheckpoint(PlainFiles):
    """An OPT checkpoint that FlexGen 0.1 converted: a folder with one numpy file per tensor, named after the tensor.

    Its names have layer_norm in place of final_layer_norm. Its lm_head.weight is a copy of the embedding and is not
    read.
    """

    MARK = "decoder.embed_tokens.weight"
    """A file that identifies such a folder."""

    def __init__(self, directory: Path) -> None:
        names = {path.name: path for path in sorted(directory.glob("decoder.*"))}
        super().__init__(
            directory,
            {
                name.replace("decoder.layer_norm.", "decoder.final_layer_norm."): read_numpy_header(path)
                for name, path in names.items()
            },
        )


def finite(made: Tensor, stored: Tensor, path: Path, weight: WeightSpec) -> Tensor:
    """`made`, which is `stored` converted to another dtype. Raises CheckpointError unless all values are finite."""
    if not made.numel() or all(value.isfinite() for value in made.aminmax()):  # NaN spreads to both
        return made
    if all(value.isfinite() for value in stored.aminmax()):
        raise CheckpointError(
            f"{path}: {weight.key} has values outside the range of {str(made.dtype).removeprefix('torch.')}: open "
            "the model with dtype='bfloat16' or 'float32'"
        )
    raise CheckpointError(
        f"{path}: {weight.key} contains NaN or infinite values: the file is damaged, or the training diverged. Copy "
        "or download it again"
    )


def _rows_of(extent: Extent, rows: range) -> Extent:
    width = extent.nbytes // extent.shape[0]
    shape = (len(rows), *extent.shape[1:])
    return replace(extent, offset=extent.offset + rows.start * width, nbytes=len(rows) * width, shape=shape)
