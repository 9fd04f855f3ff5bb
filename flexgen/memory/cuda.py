"""A GPU that torch calls `cuda`."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexgen.errors import CapacityError, RequestError
from flexgen.kernels.workspaces import GPU, gpu_workspaces
from flexgen.memory.cuda_graphs import CudaGraphs
from flexgen.memory.device import ComputeDevice
from flexgen.memory.device_errors import named_errors, short_of_memory
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.lanes import Lane, Lanes, ThreadLane
from flexgen.memory.shared_gpu import GpuUser, cublas_bytes, shared_gpu
from flexgen.memory.store import Store
from flexgen.memory.stream_lanes import CopyLane, StreamLane
from flexgen.policy import Tier
from flexgen.results.trace import LaneName
from flexgen.units import format_bytes

_RESERVE = 0.05
"""The share of a GPU's memory, or of its cap, that memory plans leave free for loaded kernels and for holes."""


class CudaStore(Store):
    """Device memory, from torch's caching allocator."""

    def __init__(self, device: torch.device, capacity: int | None = None) -> None:
        super().__init__(Tier.GPU, capacity)
        self.device = device

    def _make(self, nbytes: int, purpose: str, copied_by_device: bool) -> Tensor:
        try:
            return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{purpose} needs {format_bytes(nbytes)} of {self.device}, but less is free "
                f"({short_of_memory(error)}): end other programs that use this GPU, put a smaller share on gpu, or "
                "use smaller batches"
            ) from error


class CudaDevice(ComputeDevice):
    """A GPU that torch calls `cuda` (NVIDIA, or AMD through ROCm)."""

    pinnable = True

    def __init__(self, device: torch.device, memory: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise RequestError(f"device {device}: no GPU is visible to torch; use device='cpu'")
        self.torch_device = torch.device("cuda", device.index or 0)
        if self.torch_device.index >= torch.cuda.device_count():
            raise RequestError(
                f"device {device}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
            )
        self.name = str(self.torch_device)
        self._compute: torch.cuda.Stream | None = None
        self._graphs: CudaGraphs | None = None
        self.memory = CudaStore(self.torch_device, memory)
        with self.active():
            torch.cuda.init()  # memory statistics are not available before
            properties = torch.cuda.get_device_properties(self.torch_device)
            total = properties.total_memory
            self._reserve = int(min(memory or total, total) * _RESERVE)
            if torch.version.hip is None:
                major, minor = torch.cuda.get_device_capability(self.torch_device)
                self.compute_capability = major + minor / 10
            of_its_kind = gpu_workspaces(self.compute_capability) if self.compute_capability else GPU
            cublas = cublas_bytes(self.torch_device)
            self._native_bfloat16 = of_its_kind.native_bfloat16
            self.workspaces = replace(
                of_its_kind,
                fixed=cublas,
                captured=None if of_its_kind.captured is None else cublas,
                multiprocessors=properties.multi_processor_count,
            )
            # The cap applies to torch's temporaries too, not only to the buffers counted here.
            self._user = GpuUser(self.memory, memory)
            self._shared = shared_gpu(self.torch_device)
            self._shared.join(self._user)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with named_errors(), torch.cuda.device(self.torch_device):
            yield

    def make_lanes(self, host: Store | None = None) -> Lanes:
        compute = StreamLane(LaneName.COMPUTE, self.torch_device)
        self._compute = compute.stream
        lanes: dict[LaneName, Lane] = {LaneName.COMPUTE: compute}
        for link in (LaneName.TO_DEVICE, LaneName.FROM_DEVICE):
            lanes[link] = CopyLane(link, self.torch_device, host)
        # Each thread waits for events of this GPU. Without this context manager, that creates a CUDA context on GPU
        # 0.
        within = partial(torch.cuda.device, self.torch_device)
        lanes[LaneName.DISK_READ] = DiskLane(LaneName.DISK_READ, within=within)
        for name in (LaneName.HOST, LaneName.DISK_WRITE):
            lanes[name] = ThreadLane(name, within=within)
        return Lanes(lanes)

    def to_device(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    from_device = to_device

    def close(self) -> None:
        super().close()
        self._graphs = None
        self._shared.leave(self._user)

    def begin_call(self, call: Hashable) -> None:
        self._shared.begin(self._user, call)

    def reserve(self, nbytes: int) -> None:
        if self._compute is not None:
            self._shared.reserve(self._compute, nbytes)

    def return_freed(self) -> None:
        self._shared.return_freed()

    def end_call(self, call: Hashable) -> None:
        self._shared.end(call)

    def fast_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """float16 for a bfloat16 checkpoint if the GPU has no bfloat16 instructions. torch emulates bfloat16 there,
        but without fused attention; `torch.cuda.is_bf16_supported` returns True."""
        if checkpoint is torch.bfloat16 and not self._native_bfloat16:
            return torch.float16
        return checkpoint

    @property
    def graphs(self) -> CudaGraphs:
        if self._graphs is None:
            self._graphs = CudaGraphs(self.torch_device)
        return self._graphs

    def settle(self) -> None:
        # Zero-filling runs on the default stream, which the lanes' streams do not wait for.
        torch.cuda.default_stream(self.torch_device).synchronize()

    def wait_for_compute(self) -> None:
        # Sleeps, whereas `synchronize` of a stream spins: host arithmetic needs the cores.
        end = torch.cuda.Event(blocking=True)
        end.record(torch.cuda.current_stream(self.torch_device))
        end.synchronize()

    def available_bytes(self) -> int | None:
        device = self.torch_device
        with self.active():
            free, _ = torch.cuda.mem_get_info(device)
        # torch keeps freed memory for later allocations.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        left = super().available_bytes()
        return max((free if left is None else min(free, left)) - self._reserve, 0)

    def peak_bytes(self) -> int:
        return self._shared.peak(self._user)
