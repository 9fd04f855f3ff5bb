"""The metadata of a GGUF file, with a check of each value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flexgen.errors import CheckpointError, ModelError, shown
from flexgen.models.gguf_header import GGUFHeader
from flexgen.models.plain_files import reading


class Metadata:
    """The metadata of a model. The object records which of its architecture's keys were read.

    All methods raise ModelError.
    """

    def __init__(self, header: GGUFHeader, name: str) -> None:
        self.header, self.name = header, name
        self.architecture = header.values.get("general.architecture")
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key` of the architecture. Files have numbers in float32, for example 1e-5 as 9.99999974e-06,
        so they are rounded to seven digits."""
        full = f"{self.architecture}.{key}"
        self._read.add(full)
        value = self.header.values.get(full, default)
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def needed(self, key: str) -> Any:
        """`get` of a key that the file must have."""
        value = self.get(key)
        if value is None:
            raise ModelError(
                f"{self.name}: the metadata have no {self.architecture}.{key}: the file is damaged or of an old "
                "version. Download a newer file of the model"
            )
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """The value of a key with a size that is the same in all layers. Without `default`, the file must have it."""
        value = self.needed(key) if default is None else self.get(key, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{self.name}: {self.architecture}.{key} = {shown(value)} is not supported; it must be one size for "
                "all layers"
            )
        return value

    def has(self, tensor: str) -> bool:
        """Whether the files have a tensor."""
        return tensor in self.header.tensors

    def floats(self, name: str) -> list[float]:
        """The values of a small float32 tensor."""
        stored = self.header.tensors[name]
        if stored.dtype != torch.float32:
            raise CheckpointError(f"{stored.path}: {name} has the type {stored.kind}; expected F32")
        with reading(stored.path), stored.path.open("rb") as file:
            file.seek(stored.offset)
            return np.frombuffer(file.read(stored.nbytes), dtype="<f4").tolist()

    def check_all_read(self) -> None:
        """Raise for the first key of the architecture that was not read."""
        for key, value in self.header.values.items():
            if key.startswith(f"{self.architecture}.") and key not in self._read:
                raise ModelError(
                    f"{self.name}: {key} = {shown(value)} is not supported: flexgen does not know this key for GGUF "
                    "files. Use the model in safetensors"
                )
