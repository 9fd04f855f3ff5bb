"""Weights used from a checkpoint's own file are checked for NaN and infinite values when they are first read.

Nothing is read twice. The check is done by the thread that ends the read, in numpy: torch would give that thread a
team of OpenMP threads of its own (`kernels/threads.py`).
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
"""Values that are checked at once: they stay in a core's own cache."""

_EXPONENTS: dict[torch.dtype, tuple[type[np.uint16] | type[np.uint32], int]] = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}
"""Bits of a value that are all ones in NaN and infinite values only."""


@dataclass(frozen=True)
class Part:
    """Values of the weight `key` that come from byte `offset` of a file into `data`, uint8 in host memory."""

    key: str
    path: Path
    offset: int
    data: Tensor


def check_finite(data: Tensor, dtype: torch.dtype, path: Path, key: str) -> None:
    """Raises CheckpointError if `data`, the bytes of values in `dtype`, holds NaN or infinite ones."""
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


class CheckedRead:
    """A `ReadJob` after which those of `parts` that are not in `checked` yet are checked, and put there."""

    def __init__(
        self, job: ReadJob, parts: Sequence[Part], dtype: torch.dtype, checked: set[tuple[str, int, int]]
    ) -> None:
        self._job = job
        self._parts = parts
        self._dtype = dtype
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
        """Raises CheckpointError with the name of the tensor that holds NaN or infinite values."""
        for part in self._parts:
            key = part.key, part.offset, part.data.nbytes
            if key not in self._checked:
                check_finite(part.data, self._dtype, part.path, part.key)
                self._checked.add(key)


@dataclass(frozen=True)
class _Checking:
    transfer: Transfer
    read: CheckedRead

    def wait(self) -> None:
        self.transfer.wait()
        self.read.check()
