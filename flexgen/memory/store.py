"""Stores: allocate the memory of one tier as flat byte buffers, and count it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgen.errors import CapacityError
from flexgen.policy import Tier
from flexgen.units import format_bytes


class Store(ABC):
    """The memory of one tier. `used` and `peak` count the bytes of live buffers."""

    pageable = False
    """Whether a GPU copies host memory of it that is not pinned. Such a copy blocks the thread that enqueues it."""

    def __init__(self, tier: Tier, capacity: int | None = None) -> None:
        self.tier = tier
        self.capacity = capacity
        self.used = 0
        self.peak = 0
        self.cached = 0
        """Bytes of `used` that are parts of mapped files. The system counts them as free: it can read them again."""
        self._live: dict[int, int] = {}

    def allocate(
        self,
        nbytes: int,
        purpose: str,
        keep: Callable[[Tensor], object] | None = None,
        copied_by_device: bool = True,
        in_use: int | None = None,
    ) -> Tensor:
        """Allocate a zero-filled uint8 buffer (nbytes,). Raises CapacityError, naming `purpose`, if it does not fit.

        keep: called with the buffer before it is counted, so that its owner can release it if Ctrl-C arrives.
        copied_by_device: whether a device's copy engines use the buffer. Only then is host memory pinned.
        in_use: the maximum bytes that the caller writes before it clears them with `clear`, if the store takes memory
            when it is first written (`by_need`). These are counted instead of `nbytes`.
        """
        self._check(nbytes if in_use is None else in_use, purpose)
        if in_use is None:
            buffer = self._make(nbytes, purpose, copied_by_device)
        else:
            buffer, nbytes = self._make_by_need(nbytes, purpose, copied_by_device), in_use
        if keep is not None:
            keep(buffer)
        address, peak = buffer.data_ptr(), max(self.peak, self.used + nbytes)
        # No calls below: Python handles signals only at calls and jumps, so these statements run together or not at
        # all.
        before = self._live[address] if address in self._live else 0  # noqa: SIM401
        self._live[address] = before + nbytes
        self.used += nbytes
        self.peak = peak
        return buffer

    @property
    def spare(self) -> int:
        """Bytes that are kept for later buffers, in addition to `used`."""
        return 0

    @property
    def pinned(self) -> int:
        """Bytes that are pinned, spare ones included."""
        return 0

    def allow(self, held: int, pinned: int) -> None:  # noqa: B027 (only a store that pins has to)
        """Set the limits for later allocations: `held` bytes, including spare ones, and `pinned` bytes of pinned
        memory."""

    def adopt(self, nbytes: int, purpose: str, cached: bool = False) -> None:
        """Count memory of this tier that is not allocated here and that is in use until `close`: a library's own, or
        a part of a mapped file (`cached`)."""
        self._check(nbytes, purpose)
        self._count(nbytes)
        self.cached += nbytes if cached else 0

    def _count(self, nbytes: int) -> None:
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def _check(self, nbytes: int, purpose: str) -> None:
        if self.capacity is not None and self.used + nbytes > self.capacity:
            raise CapacityError(
                f"{purpose} needs {format_bytes(nbytes)} on the {self.tier} tier, where "
                f"{format_bytes(self.used)} of {format_bytes(self.capacity)} are in use: "
                f"put a smaller share on {self.tier} or use smaller batches"
            )

    def release(self, buffer: Tensor) -> None:
        """Release a buffer, unless it was already released. The caller must drop its last reference."""
        self._free(buffer)
        address = buffer.data_ptr()
        if address in self._live:  # no calls below, as in `allocate`
            self.used -= self._live[address]
            del self._live[address]

    def clear(self, buffer: Tensor) -> None:
        """Fill a part of a buffer with zeros. Memory that is taken when it is first written is given back."""
        buffer.zero_()

    @abstractmethod
    def _make(self, nbytes: int, purpose: str, copied_by_device: bool) -> Tensor: ...

    def _make_by_need(self, nbytes: int, purpose: str, copied_by_device: bool) -> Tensor:
        raise NotImplementedError(f"the {self.tier} tier cannot take memory page by page")

    def _free(self, buffer: Tensor) -> None:  # noqa: B027 (most memory is freed with its last reference)
        pass

    def close(self) -> None:
        """Release every buffer."""
        self._live.clear()
        self.used = self.cached = 0


def tensor_at(buffer: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A typed view of `buffer` (uint8) from byte `offset`."""
    nbytes = math.prod(shape) * dtype.itemsize
    return buffer[offset : offset + nbytes].view(dtype).view(tuple(shape))
