"""Pinned host memory: registered with the driver in the context of a GPU, so that its copy engines can access it."""

from __future__ import annotations

import contextlib
import logging
import mmap

import torch

from flexgen.units import format_bytes

logger = logging.getLogger(__name__)


class Pinning:
    """The memory that is registered for one GPU.

    A failed call of the CUDA runtime leaves its error in the calling thread. torch's check after the next kernel
    launch would report it as an error of that kernel. So this class reads each status and clears the error.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: dict[int, mmap.mmap] = {}  # by address

    @property
    def nbytes(self) -> int:
        """Bytes that are registered."""
        return sum(map(len, self._registered.values()))

    def mapping(self, address: int) -> mmap.mmap:
        """The memory that is registered at `address`."""
        return self._registered[address]

    def has(self, address: int) -> bool:
        return address in self._registered

    def pin(self, address: int, mapping: mmap.mmap) -> int:
        """Register `mapping`, which begins at `address`. Returns the CUDA runtime's status, 0 for success."""
        with torch.cuda.device(self._device):
            status = int(torch.cuda.cudart().cudaHostRegister(address, len(mapping), 0))
            if status:
                self._forget_error()
                return status
        self._registered[address] = mapping
        if hasattr(mmap, "MADV_DONTFORK"):
            # After a fork, a write of the parent copies a shared page, and the GPU would keep the old one.
            mapping.madvise(mmap.MADV_DONTFORK)
        return 0

    def unpin(self, address: int) -> None:
        """Remove the registration at `address`, if there is one."""
        mapping = self._registered.pop(address, None)
        if mapping is None:
            return
        with torch.cuda.device(self._device):
            status = int(torch.cuda.cudart().cudaHostUnregister(address))
            if status:
                self._forget_error()
        if status:
            logger.warning(
                "%s of pinned memory cannot be unpinned (CUDA error %d): they stay locked until the process ends",
                format_bytes(len(mapping)),
                status,
            )

    def close(self) -> None:
        """Remove every registration."""
        for address in list(self._registered):
            self.unpin(address)

    def _forget_error(self) -> None:
        # torch's `cudart` has no cudaGetLastError. torch's check after this launch finds the error and clears it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device).add_(1)
