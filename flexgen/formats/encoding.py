"""The interface of formats: how a checkpoint stores a quantized matrix in several tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flexgen.errors import ModelError, shown
from flexgen.kernels.encoded_linear import EncodedForm, EncodedParts

_PIECE = 1 << 19
"""Values decoded at once on a CPU, so that the temporaries fit in its caches."""
_GPU_PIECE = 1 << 25
"""Values decoded at once on a GPU, so that launches do not dominate the time."""
_VALUE_BYTES = 16
"""An upper bound of the temporary bytes per value while it is decoded."""

E8M0 = torch.float8_e8m0fnu
"""Powers of two, stored as the exponent plus 127."""
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """One tensor of a quantized matrix.

    suffix: the end of its name, after the name of the module ("layers.0.mlp.up_proj"). dtypes: the dtypes that it may
    have. A shape (1,) also means a tensor without dimensions.
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]

    def read_as(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the values of a part that is stored in `dtype`, one of `dtypes`.

        Powers of two are also stored as uint8. Only as e8m0, their NaN (255) is found when the file is read.
        """
        return E8M0 if dtype is torch.uint8 and E8M0 in self.dtypes else dtype


class Encoding(ABC):
    """How a checkpoint stores a quantized matrix (out, in). Instances are immutable, hashable and picklable."""

    host_bytes: ClassVar[int]
    """Bytes that a core reads from memory in the time it takes to decode one value in torch, measured on an EPYC."""

    @property
    def rows_at_once(self) -> int:
        """`values` is called for ranges of rows that begin at multiples of it."""
        return 1

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for messages, and the key of measured rates."""

    @property
    @abstractmethod
    def mark(self) -> tuple[str, torch.dtype]:
        """The suffix and the dtype of the first part. Its presence shows that a matrix is stored in this encoding."""

    @property
    @abstractmethod
    def form(self) -> EncodedForm:
        """How the codes and scales are stored, for kernels."""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """The tensors of a matrix of `shape`: the codes, the scales, and perhaps zero points or another scale.

        Raises ValueError, with the reason, if there is no matrix of this shape.
        """

    @abstractmethod
    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of the matrix in float32, perhaps with more columns than the matrix.

        `parts` are the tensors that the method of this name describes.
        """

    def decode(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write the matrix to `out` (out, in), rounded to the dtype of `out`."""
        rows, width = out.shape
        if EncodedParts(self.form, tuple(parts), (rows, width)).decode(out):
            return
        piece = _PIECE if out.device.type == "cpu" else _GPU_PIECE
        step = max(piece // width // self.rows_at_once, 1) * self.rows_at_once
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            out[begin:end].copy_(self.values(parts, begin, end)[:, :width])

    def decode_workspace(self, shape: Sequence[int]) -> int:
        """The maximum memory that decoding a matrix on a GPU allocates, in addition to the result, in bytes."""
        rows, width = shape
        return _VALUE_BYTES * min(rows * width, max(_GPU_PIECE, self.rows_at_once * width))


class Settings:
    """The settings of a quantization in a config. All methods raise ModelError for an unsupported value."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        """name: the name of the model and the config's field, for messages."""
        self.values = values
        self.name = name

    def one_of(self, key: str, supported: Collection[Any]) -> Any:
        """The value of `key` (None if it is absent), which must be one of `supported`."""
        value = self.values.get(key)
        # By type too: 1 is not True, and 4.0 is not 4.
        if not any(type(value) is type(each) and value == each for each in supported):
            choices = ", ".join("absent" if each is None else repr(each) for each in supported)
            raise ModelError(f"{self.name}: {key} = {shown(value)} is not supported; supported: {choices}")
        return value

    def size(self, key: str) -> int:
        """The value of `key`, an integer above 0."""
        value = self.values.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{self.name}: {key} = {shown(value)} is not a size; it must be an integer above 0"
            )
        return value

    def inner(self, key: str) -> Settings:
        """The settings in the object `key`."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.name}: {key} = {shown(value)} is not supported; expected an object")
        return Settings(value, f"{self.name}: {key}")


def repeated(scales: Tensor, size: int, group: int) -> Tensor:
    """Scales (..., groups) for each of `size` values in groups of `group`, the last of which may be shorter."""
    return scales.repeat_interleave(group, dim=-1)[..., :size]


def check_groups(columns: int, group: int) -> None:
    """Raises ValueError unless groups of `group` values divide a row."""
    if columns % group:
        raise ValueError(f"its rows have {columns} values, which groups of {group} do not divide")
