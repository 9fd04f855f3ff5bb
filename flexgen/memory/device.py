"""What every compute device offers: where layers run, the memory they run in, and the links that feed it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from flexgen.kernels.workspaces import HOST, Workspaces
from flexgen.layout.topology import LINKED
from flexgen.memory.device_errors import named_errors
from flexgen.memory.lanes import Lanes
from flexgen.memory.store import Store


class Graphs(Protocol):
    """Graphs of work of the compute lane, each of which is one launch.

    They share the memory of their temporaries, so replay them on that lane only.
    """

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Call `work`, and return a function that replays what it enqueued. Nothing of it runs on the device before.

        `work` must not wait for the device, and tensors that it reads must keep their addresses. Raises RuntimeError
        where the device refuses.
        """


class ComputeDevice(ABC):
    """Where layers run. `memory` is its store (the GPU tier)."""

    name: str
    torch_device: torch.device
    memory: Store
    topology = LINKED
    """The lanes between host memory and its own."""
    in_host_memory = False
    """Whether its memory is a separate part of host memory, so that both count towards what the host has free."""
    pinnable = False
    """Whether its links are faster from pinned host memory."""
    shares_cores = False
    """Whether it computes on the host's own cores, so that the host's arithmetic adds to its own."""
    compute_capability = 0.0
    """Of an NVIDIA GPU, such as 8.6; 0 of other devices."""
    workspaces: Workspaces = HOST
    """What its libraries and kernels take in addition to operands and results."""
    disk_bandwidth: float | None = None
    """Bytes/s at which the disk is held back; None for the real disk."""

    @property
    def shares_host_memory(self) -> bool:
        """Whether host memory is its memory, so that nothing has to cross a link."""
        return self.topology.shares_host_memory

    @abstractmethod
    def make_lanes(self, host: Store | None = None) -> Lanes:
        """Lanes of its resources, one for every name.

        `host`: the store of host memory that the links move from and to; its memory is taken for pinned without.
        """

    @abstractmethod
    def to_device(self, target: Tensor, source: Tensor) -> None:
        """Copy host memory into device memory on the current lane; contiguous, of equal bytes."""

    @abstractmethod
    def from_device(self, target: Tensor, source: Tensor) -> None:
        """Copy device memory into host memory on the current lane; contiguous, of equal bytes."""

    def fast_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """The dtype to compute in for a checkpoint's dtype, where the user has no wish."""
        return checkpoint

    def prelayout(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """Lays out a matrix (out, in) in host memory as the device's products read it fastest, for matrices in
        `dtype` that are stored on the device; None where products read them as they are."""
        return None

    def peak_bytes(self) -> int:
        """Most device memory that the model on it has taken at once."""
        return self.memory.peak

    def begin_call(self, call: Hashable) -> None:  # noqa: B027 (only a GPU has to)
        """Prepare the process for a call that computes on the device. A call may begin again before it ends."""

    def end_call(self, call: Hashable) -> None:  # noqa: B027 (only a GPU has to)
        """Undo `begin_call`; does nothing for a call that has not begun."""

    def reserve(self, nbytes: int) -> None:  # noqa: B027 (only a GPU has to)
        """Have `nbytes` of free memory in one piece for the temporaries of the compute lane, where possible."""

    @property
    def graphs(self) -> Graphs:
        """Of a device whose `workspaces.captured` is a number. Raises RuntimeError where it refuses to capture."""
        raise NotImplementedError(f"{self.name} captures no graphs")

    def close(self) -> None:
        """Give the memory back, as far as nobody holds a buffer; may be called again when nobody does."""
        self.memory.close()

    def active(self) -> AbstractContextManager[object]:
        """Within it the calling thread works on this device, and errors of torch are raised as flexgen's.

        Raises CapacityError for memory that ran out, StepCapacityError where a step did, and DeviceError for a device
        that has failed.
        """
        return named_errors()

    def settle(self) -> None:  # noqa: B027 (only a device with streams has to)
        """Block the host until buffers that were made outside the lanes are ready for them."""

    def wait_for_compute(self) -> None:  # noqa: B027 (only a device with streams has to)
        """Block the host until what the compute lane has enqueued is done."""

    def available_bytes(self) -> int | None:
        """Device memory that can be taken now, None if it is not limited on its own."""
        capacity = self.memory.capacity
        return None if capacity is None else capacity - self.memory.used
