"""Checkpoint files: the base class of all formats, and those that can be read in place (safetensors, numpy files)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flexgen.errors import CheckpointError, shown
from flexgen.formats import Encoding, instead
from flexgen.formats.encoding import E8M0
from flexgen.kernels.e4m3 import E4M3, has_nan
from flexgen.models.headers import FLOATS, StoredTensor, read_header, read_numpy_header
from flexgen.models.layer import Layer
from flexgen.models.plain_files import read_into, reading
from flexgen.models.samples import sample
from flexgen.models.sources import Source
from flexgen.models.spec import EncodedWeight, ModelSpec, WeightSpec
from flexgen.models.text_part import text_tensors


@dataclass(frozen=True)
class Extent:
    """The place of a tensor's bytes: `nbytes` from `offset` in `path`, row-major and little-endian."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


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
_CONFIG_FIELD = "quantization_config"


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


class TensorFiles(ABC):
    """The common part of all files: a directory, the metadata of its tensors by name, and the encodings of quantized
    weights.

    Of a multimodal checkpoint, it has the tensors of the text model only (`text_tensors`).
    """

    def __init__(
        self, directory: Path, tensors: dict[str, StoredTensor], encodings: Sequence[Encoding] = ()
    ) -> None:
        self.directory: Path | None = directory
        self._tensors = text_tensors(tensors)
        self._encodings = encodings
        self._encoded: dict[str, EncodedWeight | None] = {}

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
        return self._source(weight) is not None or self.encoded(weight) is not None

    def dtype_of(self, weight: WeightSpec) -> torch.dtype:
        """The dtype of the stored weight. Raises CheckpointError if it is missing or not a float."""
        source, stored = self._find(weight)
        if stored.dtype not in FLOATS.values():
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())
            raise CheckpointError(
                f"{stored.path}: {source.name} has dtype {stored.kind}, which is not supported; "
                f"supported: {supported}"
            )
        assert stored.dtype is not None
        return stored.dtype

    @abstractmethod
    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`."""

    def encoded(self, weight: WeightSpec) -> EncodedWeight | None:
        """The tensors of a weight that is stored quantized; None for other weights.

        Raises CheckpointError if one of the tensors is missing or has the wrong shape or dtype.
        """
        if not self._encodings or len(weight.shape) != 2 or weight.quantized:
            return None
        if weight.key not in self._encoded:
            self._encoded[weight.key] = self._find_encoded(weight)
        return self._encoded[weight.key]

    def _find_encoded(self, weight: WeightSpec) -> EncodedWeight | None:
        for source in weight.sources:
            module = source.name.removesuffix(".weight")
            for encoding in self._encodings:
                suffix, dtype = encoding.mark
                stored = self._tensors.get(module + suffix)
                if stored is not None and stored.dtype is dtype:
                    return EncodedWeight(encoding, self._parts(weight, source, encoding))
        return None

    def _parts(self, weight: WeightSpec, source: Source, encoding: Encoding) -> tuple[WeightSpec, ...]:
        """The tensors of a weight that is stored at `source` in `encoding`."""
        where = f"{self.directory}: {weight.key} is stored in {encoding.name}"
        if len(source.take) > 1:
            raise CheckpointError(
                f"{where} as some rows of a matrix, which is not supported: use a checkpoint that is not quantized"
            )
        rows, columns = weight.shape
        try:
            parts = encoding.parts((rows, columns))
        except ValueError as error:
            raise CheckpointError(f"{where}, but {error}: use a checkpoint that is not quantized") from error
        found = []
        for part in parts:
            name = source.name.removesuffix(".weight") + part.suffix
            stored = self._tensors.get(name)
            stack = (*source.shape[:1], *part.shape)
            if stored is None:
                raise CheckpointError(
                    f"{where}, but {name} is missing: the checkpoint is not complete. Download it again"
                )
            if (
                stored.dtype not in part.dtypes
                or stored.shape != stack
                and (stored.shape, stack) != ((), (1,))
            ):
                expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in part.dtypes)
                raise CheckpointError(
                    f"{where}, but {name} is {stored.kind} {stored.shape}; expected {expected} {stack}: the "
                    "quantization_config in config.json belongs to another checkpoint. Download it again"
                )
            found.append(
                WeightSpec(
                    weight.name + part.suffix,
                    part.shape,
                    (Source(name, source.take, stack if source.take else ()),),
                    dtype=part.read_as(stored.dtype),
                    encodable=False,
                    quantized=True,
                )
            )
        return tuple(found)

    def _decoded(
        self, weight: WeightSpec, encoded: EncodedWeight, dtype: torch.dtype, rows: range | None
    ) -> Tensor:
        """A quantized weight, or some of its rows, in the dtype that a model of the dtype `dtype` needs."""
        parts = [self.read(part, dtype) for part in encoded.parts]
        out = torch.empty(weight.shape, dtype=weight.dtype_in(dtype))
        encoded.encoding.decode(parts, out)
        if not all(value.isfinite() for value in out.aminmax()):
            wide = torch.empty(weight.shape)
            encoded.encoding.decode(parts, wide)
            finite(out, wide, self._find(encoded.parts[0])[1].path, weight)
        return out if rows is None else out[rows.start : rows.stop]

    def check_unquantized(self) -> None:
        """Raises CheckpointError for tensors that only quantized checkpoints have if the config has no encodings."""
        if self._encodings:
            return
        for name, stored in self._tensors.items():
            method = _QUANTIZED.get(name.rpartition(".")[2])
            if method or "float8" in stored.kind or stored.kind.startswith("F8"):
                raise CheckpointError(
                    f"{stored.path}: {shown(name)} ({stored.kind}) belongs to quantized weights "
                    f"({method or 'fp8'}), but config.json has no {_CONFIG_FIELD} that describes them. {instead()}"
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
        weights = [w for layer in layers for w in layer.weights if self.encoded(w) is None]
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
        return None if weight.transposed or self.encoded(weight) else self._extent(weight)

    def _extent(self, weight: WeightSpec) -> Extent:
        """The place of the weight's bytes, transposed or not."""
        source, stored = self._find(weight)
        # The tensors of quantized weights have other dtypes, which were checked when they were found.
        dtype = weight.dtype if weight.quantized and weight.dtype else self.dtype_of(weight)
        offset = stored.offset + source.skipped * dtype.itemsize
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        return Extent(stored.path, offset, weight.numel * dtype.itemsize, dtype, shape)

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`. It uses plain reads, so that no file stays mapped."""
        if (encoded := self.encoded(weight)) is not None:
            return self._decoded(weight, encoded, dtype, rows)
        extent, dtype = self._extent(weight), weight.dtype_in(dtype)
        if rows is not None and not weight.transposed:
            extent = _rows_of(extent, rows)
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
        read_into(memoryview(buffer.numpy()), extent.path, extent.offset, weight.key)  # type: ignore[arg-type]
        stored = buffer.view(extent.dtype).view(extent.shape)
        if weight.transposed:
            stored = stored.T[slice(None) if rows is None else slice(rows.start, rows.stop)].contiguous()
        return finite(stored.to(dtype), stored, extent.path, weight)


class SafetensorsCheckpoint(PlainFiles):
    """One or more safetensors files of one directory."""

    def __init__(self, directory: Path, files: Sequence[Path], encodings: Sequence[Encoding] = ()) -> None:
        tensors = by_name(item for path in files for item in read_header(path).items())
        super().__init__(directory, tensors, encodings)


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
    nan_codes = {E4M3: has_nan, E8M0: _has_nan_power}.get(made.dtype)
    if nan_codes and nan_codes(made.view(torch.uint8)):
        raise _not_finite(path, weight)
    if made.dtype.itemsize == 1 or not made.dtype.is_floating_point:
        return made
    if not made.numel() or all(value.isfinite() for value in made.aminmax()):  # NaN spreads to both
        return made
    if all(value.isfinite() for value in stored.aminmax()):
        raise CheckpointError(
            f"{path}: {weight.key} has values outside the range of {str(made.dtype).removeprefix('torch.')}: open "
            "the model with dtype='bfloat16' or 'float32'"
        )
    raise _not_finite(path, weight)


def _has_nan_power(codes: Tensor) -> bool:
    """Whether any of the codes (uint8) of powers of two is NaN."""
    return bool(codes.eq(0xFF).any())


def _not_finite(path: Path, weight: WeightSpec) -> CheckpointError:
    return CheckpointError(
        f"{path}: {weight.key} contains NaN or infinite values: the file is damaged, or the training diverged. Copy "
        "or download it again"
    )


def _rows_of(extent: Extent, rows: range) -> Extent:
    width = extent.nbytes // extent.shape[0]
    shape = (len(rows), *extent.shape[1:])
    return replace(extent, offset=extent.offset + rows.start * width, nbytes=len(rows) * width, shape=shape)
