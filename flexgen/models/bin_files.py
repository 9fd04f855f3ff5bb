"""Checkpoints in torch's `.bin` format. Only tensors are loaded; no code of a file runs."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen.errors import CheckpointError
from flexgen.formats import Encoding
from flexgen.models.headers import DTYPES, SHOWN_CHARACTERS, StoredTensor
from flexgen.models.plain_files import check_file, reading
from flexgen.models.samples import archive_content
from flexgen.models.spec import WeightSpec
from flexgen.models.tensor_files import TensorFiles, by_name, finite


class BinCheckpoint(TensorFiles):
    """One or more `.bin` files of one directory, read with `weights_only`, so that no code of a file runs."""

    def __init__(self, directory: Path, files: Sequence[Path], encodings: Sequence[Encoding] = ()) -> None:
        self._legacy: tuple[Path, dict[str, Any]] | None = None
        found = []
        for path in files:
            for name, tensor in self._load(path).items():
                if isinstance(name, str) and isinstance(tensor, Tensor):
                    dtype = tensor.dtype if tensor.dtype in DTYPES.values() else None
                    found.append((name, StoredTensor(path, str(tensor.dtype), dtype, tuple(tensor.shape))))
        super().__init__(directory, by_name(found), encodings)

    @property
    def fingerprint(self) -> str:
        """A digest of the files' names and contents (see `archive_content`), but not of their paths and times."""
        paths = sorted({stored.path for stored in self._tensors.values()})
        content = []
        for path in paths:
            with reading(path):
                content.append((path.name, archive_content(path)))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def extent(self, weight: WeightSpec) -> None:
        """Always None: tensors in a pickle cannot be read in place."""

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """See `Checkpoint.read`. The file is mapped only during this call."""
        if (encoded := self.encoded(weight)) is not None:
            return self._decoded(weight, encoded, dtype, rows)
        source, stored = self._find(weight)
        tensor, dtype = self._load(stored.path)[source.name], weight.dtype_in(dtype)
        part = tensor.flatten()[source.skipped :][: weight.numel]
        if weight.quantized:  # perhaps powers of two that are stored as integers
            part = part.view(dtype)
        tensor = part.view(weight.shape[::-1]).T if weight.transposed else part.view(weight.shape)
        if rows is not None:
            tensor = tensor[rows.start : rows.stop]
        made = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return finite(made, tensor, stored.path, weight)

    def _load(self, path: Path) -> dict[str, Any]:
        if self._legacy is not None and self._legacy[0] == path:
            return self._legacy[1]
        check_file(path)
        try:
            mappable = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
        except pickle.UnpicklingError as error:
            # Its own message advises to allow code of the file to run.
            raise CheckpointError(
                f"{path}: cannot be read as a checkpoint of tensors: it is damaged or contains Python objects, which "
                "are never loaded. Save the model's state_dict, preferably as safetensors"
            ) from error
        except Exception as error:  # a damaged file can raise any exception
            reason = str(error).partition("\n")[0][:SHOWN_CHARACTERS]
            raise CheckpointError(f"{path}: cannot be read as a checkpoint of tensors: {reason}") from error
        if not isinstance(tensors, dict):
            raise CheckpointError(
                f"{path}: contains a {type(tensors).__name__}; expected a dict of tensors by name"
            )
        if not mappable:
            # The format before torch 1.6 can only be read whole. Keep the last file: weights are read in its order.
            self._legacy = (path, tensors)
        return tensors
