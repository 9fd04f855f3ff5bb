"""The state of a GPU that torch keeps per process, shared by all models on the GPU.

It consists of the allocator's cap and peak, the workspaces of cuBLAS, and the attention backends. Each model on a GPU
is a `GpuUser`. A `SharedGpu` computes the cap from the caps of all users, and measures the peak of each of them.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import torch

from flexgen.kernels.workspaces import GPU
from flexgen.memory.store import Store

_HOLES = 1 / 8
"""The space for holes between a computation's temporaries, as a share of their bytes."""


@dataclass(eq=False)
class GpuUser:
    """One model on a GPU. `memory` allocates its buffers; `cap` is the maximum bytes that it may allocate."""

    memory: Store
    cap: int | None = None
    others: int = 0
    """Bytes that other users had when the model began to compute."""
    most: int = 0
    """The peak of its bytes while it computed, including temporaries."""


class _CudnnAttention:
    """Disables the cuDNN attention backend while at least one call computes on a GPU.

    On Hopper and later, torch prefers cuDNN for prompts. cuDNN builds a plan for each new shape, and each run of rows
    with equal padding is a new shape. torch's flag is per process, so your own attention does not use cuDNN during a
    call either.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._without = 0
        self._before = True

    def leave_out(self) -> None:
        with self._lock:
            self._without += 1
            if self._without == 1:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)

    def restore(self) -> None:
        with self._lock:
            self._without -= 1
            if not self._without:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_cudnn_attention = _CudnnAttention()


class SharedGpu:
    """The models that use one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._users: weakref.WeakSet[GpuUser] = weakref.WeakSet()
        """The open models. A model that was deleted without being closed has no cap any more."""
        self._calls: dict[Hashable, GpuUser] = {}
        self._fraction: float | None = None
        """The share of the GPU that the process had before the first cap; None while there is no cap."""
        self._taken_before = 0
        """Bytes that torch had allocated for others before the first cap."""

    def join(self, user: GpuUser) -> None:
        """Add a model: its cap counts until `leave`."""
        with self._lock:
            self._users.add(user)
            self._set_cap()

    def leave(self, user: GpuUser) -> None:
        """Remove a closed model: free unused memory and end its cap. May be called again."""
        with self._lock:
            if user in self._users:
                self._users.discard(user)
                self._set_cap()
            # The error of a failed device was already raised.
            with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
                self._free_workspaces()
                torch.cuda.empty_cache()  # torch keeps freed memory until then

    def begin(self, user: GpuUser, call: Hashable) -> None:
        """The model begins to compute `call`: measure its peak from now on, and disable cuDNN attention.

        Does nothing for a call that has already begun.
        """
        with self._lock:
            if call in self._calls:
                return
            self._measure()
            allocated = torch.cuda.memory_allocated(self._device)
            if user not in self._calls.values():
                user.others = max(allocated - user.memory.used, 0)
            _cudnn_attention.leave_out()
            self._calls[call] = user

    def end(self, call: Hashable) -> None:
        """The call has ended. Does nothing for a call that has not begun."""
        with self._lock:
            if call not in self._calls:
                return
            self._measure()
            del self._calls[call]
            _cudnn_attention.restore()
            self._free_workspaces()

    def reserve(self, stream: torch.cuda.Stream, nbytes: int) -> None:
        """Make torch keep a free segment for `nbytes` of tensors on `stream` and for the holes between them.

        torch splits a free segment, but never joins segments from several allocations of the driver. Tensors of
        growing sizes would leave smaller segments that later tensors do not fit in. Does nothing if there is not
        enough contiguous memory.
        """
        with self._lock:
            self._measure()
            with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.stream(stream):
                torch.empty(int(nbytes * (1 + _HOLES)), dtype=torch.uint8, device=self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def return_freed(self) -> None:
        """Return the freed memory that torch keeps for later tensors of similar sizes."""
        with self._lock, torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def peak(self, user: GpuUser) -> int:
        """The peak of the model's bytes.

        It excludes bytes that others had when the model began to compute. Models that compute at the same time in
        several threads count each other's temporaries.
        """
        with self._lock:
            self._measure()
            return max(user.most, user.memory.peak)

    def _measure(self) -> None:
        """Record the peak since the last measurement for the computing models, and reset it."""
        if self._calls:
            most = torch.cuda.max_memory_allocated(self._device)
            for user in self._calls.values():
                user.most = max(user.most, most - user.others)
        torch.cuda.reset_peak_memory_stats(self._device)

    def _free_workspaces(self) -> None:
        """Free the workspaces of cuBLAS. torch keeps one for each thread and stream until the process ends, and each
        model has its own streams."""
        if not self._calls:
            torch._C._cuda_clearCublasWorkspaces()

    def _set_cap(self) -> None:
        """Set the cap of the process: the sum of all models' caps, plus the bytes that others had before."""
        caps = [user.cap for user in self._users if user.cap is not None]
        if caps and self._fraction is None:
            torch.cuda.empty_cache()
            self._fraction = torch.cuda.get_per_process_memory_fraction(self._device)
            self._taken_before = torch.cuda.memory_reserved(self._device)
        if self._fraction is None:
            return
        fraction = self._fraction
        if caps and len(caps) == len(self._users):
            total = torch.cuda.get_device_properties(self._device).total_memory
            fraction = min((self._taken_before + sum(caps)) / total, fraction)
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)
        if not caps:
            self._fraction = None


def cublas_bytes(device: torch.device) -> int:
    """Bytes of the workspace that torch allocates for cuBLAS for each stream on which a thread computes."""
    find = getattr(torch._C, "_cuda_getCublasWorkspaceSize", None)
    if find is None:  # older torch versions allocate at most 32 MiB
        return GPU.fixed
    with torch.cuda.device(device):
        return find()


@cache
def shared_gpu(device: torch.device) -> SharedGpu:
    """The one `SharedGpu` of a GPU, whose number `device` has."""
    return SharedGpu(device)
