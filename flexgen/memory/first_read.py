"""Checks weights that are read from a checkpoint's own file for NaN and infinite values on their first read.

Nothing is read twice. The thread that ends the read does the check, in numpy: torch would start another team of
OpenMP threads for this thread (`kernels/threads.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import CheckpointError
from flexgen.memory.disk import ReadJob, Transfer

_PIECE = 1 << 16
"""Values per piece of the check. A piece fits in the cache of a core."""

_EXPONENTS: dict[torch.dtype, tuple[type[np.uint8] | type[np.uint16] | type[np.uint32], int]] = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
    torch.float8_e8m0fnu: (np.uint8, 0xFF),
}
"""The bits of a value that are all ones only in NaN and infinite values: the exponent, or all bits except for the
sign."""


@dataclass(frozen=True)
class Part:
    """Values of the weight `key` in `dtype`, read from byte `offset` of a file to `data`, uint8 in host memory."""

    key: str
    path: Path
    offset: int
    data: Tensor
    dtype: torch.dtype


def check_finite(data: Tensor, dtype: torch.dtype, path: Path, key: str) -> None:
    """Raise CheckpointError if `data`, the bytes of values in `dtype`, contains NaN or infinite values."""
    if dtype not in _EXPONENTS:  # integers
        return
    kind, exponent = _EXPONENTS[dtype]
    values = data.numpy().view(kind)
    room = np.empty(min(_PIECE, len(values)), kind)
    for begin in range(0, len(values), _PIECE):
        piece = values[begin : begin + _PIECE]
        if np.bitwise_and(piece, kind(exponent), out=room[: len(piece)]).max() == exponent:
            raise CheckpointError(
                f"{path}: {key} contains NaN or infinite values: the file is damaged, or the training diverged. Copy "
                "or download it again"
            )


class CheckedRanges:
    """The byte ranges of each weight that were checked. A call may read it in other pieces than the last one."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[tuple[int, int]]] = {}  # disjoint and sorted

    def __contains__(self, part: Part) -> bool:
        begin, end = part.offset, part.offset + part.data.nbytes
        return any(first <= begin and end <= last for first, last in self._by_key.get(part.key, ()))

    def add(self, part: Part) -> None:
        merged: list[tuple[int, int]] = []
        added = part.offset, part.offset + part.data.nbytes
        for begin, end in sorted([*self._by_key.get(part.key, ()), added]):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], end)
            else:
                merged.append((begin, end))
        self._by_key[part.key] = merged  # if two threads add at the same time, one range is checked again


class CheckedRead:
    """A `ReadJob` that then checks the `parts` that are not in `checked`, and adds them to `checked`."""

    def __init__(self, job: ReadJob, parts: Sequence[Part], checked: CheckedRanges) -> None:
        self._job = job
        self._parts = parts
        self._checked = checked

    def __call__(self) -> None:
        self._job()
        self.check()

    def start(self) -> _Checking | None:
        transfer = self._job.start()
        if transfer is not None:
            return _Checking(transfer, self)
        self.check()
        return None

    def check(self) -> None:
        """Raise CheckpointError with the name of the tensor that contains NaN or infinite values."""
        for part in self._parts:
            if part not in self._checked:
                check_finite(part.data, part.dtype, part.path, part.key)
                self._checked.add(part)


@dataclass(frozen=True)
class _Checking:
    transfer: Transfer
    read: CheckedRead

    def wait(self) -> None:
        self.transfer.wait()
        self.read.check()
