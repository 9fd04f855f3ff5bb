"""What all models on one GPU share, because torch keeps it for the whole process.

These are the cap on the allocator, its peak, the workspaces of cuBLAS, and the backends of attention. Each model on a
GPU is a `GpuUser`. A `SharedGpu` sets the cap from the caps of all users, and measures a peak for each of them.
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
"""Share of a computation's temporaries that is added for the holes between them."""


@dataclass(eq=False)
class GpuUser:
    """One model on a GPU. `memory` is where its buffers come from, `cap` the most bytes that it may take."""

    memory: Store
    cap: int | None = None
    others: int = 0
    """Bytes that belonged to others when the model began to compute."""
    most: int = 0
    """Most bytes that it had while it computed, temporaries included."""


class _CudnnAttention:
    """Takes cuDNN out of the backends of attention while at least one call computes on a GPU.

    On Hopper and later, torch prefers cuDNN for prompts. cuDNN builds a plan for each new shape, and each run of rows
    with equal padding is a new shape. torch keeps the flag for the process, so your own attention does without cuDNN
    during a call, and only then.
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
        """Those that are open. One that was forgotten without being closed has no cap either."""
        self._calls: dict[Hashable, GpuUser] = {}
        self._fraction: float | None = None
        """The share of the GPU that the process had before the first cap; None while there is no cap."""
        self._taken_before = 0
        """Bytes that torch had for others then."""

    def join(self, user: GpuUser) -> None:
        """A model is opened: its cap counts from now on."""
        with self._lock:
            self._users.add(user)
            self._set_cap()

    def leave(self, user: GpuUser) -> None:
        """The model is closed: give back what nobody uses, and end its cap. May be called again."""
        with self._lock:
            if user in self._users:
                self._users.discard(user)
                self._set_cap()
            # The error of a device that has failed was raised before.
            with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
                self._free_workspaces()
                torch.cuda.empty_cache()  # torch keeps what is freed until then

    def begin(self, user: GpuUser, call: Hashable) -> None:
        """The model begins to compute `call`: its peak counts from here, and attention does without cuDNN.

        A call that has begun is not begun again.
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
        """The call is over. Does nothing for one that has not begun."""
        with self._lock:
            if call not in self._calls:
                return
            self._measure()
            del self._calls[call]
            _cudnn_attention.restore()
            self._free_workspaces()

    def reserve(self, stream: torch.cuda.Stream, nbytes: int) -> None:
        """Have torch keep a free piece for `nbytes` of tensors that are made on `stream`, and for holes between them.

        torch divides a free piece, but never joins what it has from several allocations of the driver. Tensors of
        growing sizes would leave behind smaller pieces, which nothing fits in later. Does nothing where there is not
        so much memory in one piece.
        """
        with self._lock:
            self._measure()
            with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.stream(stream):
                torch.empty(int(nbytes * (1 + _HOLES)), dtype=torch.uint8, device=self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self, user: GpuUser) -> int:
        """Most bytes that the model has had at once.

        What others had when it began to compute is not counted. Models that compute at the same time, in several
        threads, count the temporaries of each other.
        """
        with self._lock:
            self._measure()
            return max(user.most, user.memory.peak)

    def _measure(self) -> None:
        """Note the peak since the last time for the models that compute, and reset it."""
        if self._calls:
            most = torch.cuda.max_memory_allocated(self._device)
            for user in self._calls.values():
                user.most = max(user.most, most - user.others)
        torch.cuda.reset_peak_memory_stats(self._device)

    def _free_workspaces(self) -> None:
        """Free the workspaces of cuBLAS. torch has one for each thread and stream, and keeps them until the process
        ends; each model has streams of its own."""
        if not self._calls:
            torch._C._cuda_clearCublasWorkspaces()

    def _set_cap(self) -> None:
        """The process may take what all models together may take, on top of what others had before."""
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
    """Bytes of the workspace that torch gives cuBLAS for each stream that a thread computes on."""
    find = getattr(torch._C, "_cuda_getCublasWorkspaceSize", None)
    if find is None:  # an older torch, which has 32 MiB at most
        return GPU.fixed
    with torch.cuda.device(device):
        return find()


@cache
def shared_gpu(device: torch.device) -> SharedGpu:
    """The one `SharedGpu` of a GPU, whose number `device` has."""
    return SharedGpu(device)
