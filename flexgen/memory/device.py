"""The interface of compute devices: the processor that computes layers, its memory and its links."""

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
    """Graphs of the compute lane's work. A replay of a graph is one launch.

    Graphs share the memory of their temporaries, so replay them only on the compute lane.
    """

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Call `work`, and return a function that replays the operations that it enqueued. They run only in replays.

        `work` must not wait for the device, and tensors that it reads must keep their addresses. Raises RuntimeError
        if the device refuses to capture.
        """


class ComputeDevice(ABC):
    """A processor that computes layers. `memory` is its store (the GPU tier)."""

    name: str
    torch_device: torch.device
    memory: Store
    topology = LINKED
    """The lanes between host memory and device memory."""
    in_host_memory = False
    """Whether its memory is a separate part of host memory, so that both reduce the free memory of the host."""
    pinnable = False
    """Whether its links are faster with pinned host memory."""
    maps_files = False
    """Whether it computes with parts of mapped files, which are in the page cache of the host."""
    shares_cores = False
    """Whether it computes on the cores of the host, so that device and host arithmetic take turns."""
    compute_capability = 0.0
    """The compute capability of an NVIDIA GPU, such as 8.6; 0 for other devices."""
    workspaces: Workspaces = HOST
    """The memory that its libraries and kernels allocate in addition to operands and results."""
    disk_bandwidth: float | None = None
    """The bandwidth limit of an emulated disk in bytes/s, or None for the real disk."""

    @property
    def shares_host_memory(self) -> bool:
        """Whether it computes in host memory, so that there is no link."""
        return self.topology.shares_host_memory

    @abstractmethod
    def make_lanes(self, host: Store | None = None) -> Lanes:
        """Lanes of its resources, one for every name.

        host: the store of host memory that the links copy from and to. Without it, host memory counts as pinned.
        """

    @abstractmethod
    def to_device(self, target: Tensor, source: Tensor) -> None:
        """Copy host memory to device memory on the current lane. Both are contiguous and have the same size in
        bytes."""

    @abstractmethod
    def from_device(self, target: Tensor, source: Tensor) -> None:
        """Copy device memory to host memory on the current lane. Both are contiguous and have the same size in
        bytes."""

    def fast_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """The default dtype for computing with a checkpoint in the given dtype."""
        return checkpoint

    def prelayout(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """A function that converts a matrix (out, in) in host memory to the layout that the device's products read
        fastest, for matrices in `dtype` that are stored on the device. None if products need no other layout."""
        return None

    def peak_bytes(self) -> int:
        """The peak of the model's device memory, in bytes."""
        return self.memory.peak

    def begin_call(self, call: Hashable) -> None:  # noqa: B027 (not all devices have to)
        """Prepare the process for a call that computes on the device. May be called again before `end_call`."""

    def end_call(self, call: Hashable) -> None:  # noqa: B027 (not all devices have to)
        """Undo `begin_call`. Does nothing for a call that has not begun."""

    def reserve(self, nbytes: int) -> None:  # noqa: B027 (only a GPU has to)
        """Reserve `nbytes` of contiguous memory for the temporaries of the compute lane, if possible."""

    def return_freed(self) -> None:  # noqa: B027 (only a GPU has to)
        """Return freed memory to the driver, before buffers of other sizes are allocated."""

    @property
    def graphs(self) -> Graphs:
        """The graphs of a device whose `workspaces.captured` is a number. Raises RuntimeError if it refuses to
        capture.
        """
        raise NotImplementedError(f"{self.name} captures no graphs")

    def close(self) -> None:
        """Free the memory of all released buffers. May be called again after further buffers are released."""
        self.memory.close()

    def active(self) -> AbstractContextManager[object]:
        """A context in which the calling thread uses this device and torch's errors are raised as flexgen's.

        Raises CapacityError when memory runs out, StepCapacityError when it runs out in a step, and DeviceError when
        the device has failed.
        """
        return named_errors()

    def settle(self) -> None:  # noqa: B027 (only a device with streams has to)
        """Block the host until the lanes can use buffers that were made outside the lanes."""

    def wait_for_compute(self) -> None:  # noqa: B027 (only a device with streams has to)
        """Block the host until the compute lane has run all enqueued work."""

    def available_bytes(self) -> int | None:
        """Device memory in bytes that can be allocated now, or None if it has no limit of its own."""
        capacity = self.memory.capacity
        return None if capacity is None else capacity - self.memory.used
