"""Compute devices: where layers run, the memory they run in, and the links that feed it.

Three machines behind one face. `cuda` is a GPU. `cpu` computes in host memory, so what lives in the GPU
or CPU tier is used in place. `emulated` is a separate arena of host memory behind links of a given
bandwidth: every move is a real copy, so that a machine without a GPU exercises all three tiers.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexgen.errors import CapacityError, RequestError
from flexgen.kernels.half_linear import has_products
from flexgen.kernels.linear import can_pack, pack
from flexgen.memory.cpu import HostStore
from flexgen.memory.device_errors import named_errors, short_of_memory
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.lanes import InlineLane, Lane, Lanes, ThreadLane
from flexgen.memory.store import Store
from flexgen.memory.stream_lanes import CopyLane, StreamLane
from flexgen.policy import Tier
from flexgen.trace import LaneName
from flexgen.units import format_bytes, parse_bytes

_RESERVE = 0.05
"""Share of a GPU's memory, or of its cap, that no plan may use: for the libraries' workspaces, and holes."""
_GPU_NUMBERS = 128
"""torch.device keeps the number in 8 bits, signed."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ComputeDevice(ABC):
    """Where layers run. `memory` is its store (the GPU tier)."""

    name: str
    torch_device: torch.device
    memory: Store
    shares_host_memory = False
    """Whether host memory is its memory, so that nothing has to cross a link."""
    in_host_memory = False
    """Whether its memory is a separate part of host memory, so that both count towards what the host has free."""
    pinnable = False
    """Whether its links are faster from pinned host memory."""
    shares_cores = False
    """Whether it computes on the host's own cores, so that the host's arithmetic adds to its own."""
    disk_bandwidth: float | None = None
    """Bytes/s at which the disk is held back; None for the real disk."""

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

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether matrices that live on the device and are multiplied are better off with `pack`."""
        return False

    def pack(self, weight: Tensor) -> Tensor:
        """A matrix (out, in) in host memory, laid out as the device's products want it."""
        raise RequestError(f"device {self.name} computes with weights as they are")

    def peak_bytes(self) -> int:
        """Most device memory taken at once since the device was opened."""
        return self.memory.peak

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


class _HostArithmetic(ComputeDevice):
    """Computes on the CPU, in the thread that issues the steps.

    An order issues what a cell may overlap with before the cell computes, so nothing is lost by computing
    there, and a thread for it would take turns with the issuing one at Python's lock.
    """

    shares_cores = True

    def __init__(self, memory: Store) -> None:
        self.torch_device = torch.device("cpu")
        self.memory = memory

    def fast_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """float16 products are several times slower than others on a CPU: bfloat16 where it has instructions
        for it, float32 elsewhere (benchmarks/host_linear.py measures them)."""
        if checkpoint is not torch.float16:
            return checkpoint
        return torch.bfloat16 if has_products(torch.bfloat16) else torch.float32

    def packs(self, dtype: torch.dtype) -> bool:
        return can_pack(dtype)

    def pack(self, weight: Tensor) -> Tensor:
        return pack(weight)


class HostDevice(_HostArithmetic):
    """The CPU. The GPU tier is host memory too, so a policy written for a GPU runs here as it is."""

    name = "cpu"
    shares_host_memory = True

    def __init__(self) -> None:
        super().__init__(HostStore(Tier.CPU))

    def make_lanes(self, host: Store | None = None) -> Lanes:
        lanes: dict[LaneName, Lane] = dict.fromkeys(LaneName, InlineLane(LaneName.COMPUTE))
        lanes[LaneName.DISK_READ] = DiskLane(LaneName.DISK_READ)
        return Lanes(lanes | {LaneName.DISK_WRITE: ThreadLane(LaneName.DISK_WRITE, beside_compute=True)})

    def to_device(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    from_device = to_device


@dataclass
class Pace:
    """Holds a link at a bandwidth: `wait` returns no earlier than the bytes would have taken."""

    bandwidth: float
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def wait(self, began: float, nbytes: int) -> None:
        """Wait until `nbytes` / `bandwidth` seconds have passed since `began` (by `clock`)."""
        while (left := began + nbytes / self.bandwidth - self.clock()) > 0:
            self.sleep(left)


class EmulatedDevice(_HostArithmetic):
    """A device of `memory` bytes behind a full-duplex link of `link` bytes/s and a disk of `disk` bytes/s.

    None means not limited. Arithmetic runs on the CPU.
    """

    name = "emulated"
    in_host_memory = True

    def __init__(
        self, memory: int | None = None, link: float | None = None, disk: float | None = None
    ) -> None:
        super().__init__(HostStore(Tier.GPU, capacity=memory))
        self.disk_bandwidth = disk
        self.pace = Pace(link) if link else None

    def make_lanes(self, host: Store | None = None) -> Lanes:
        inline, disk = LaneName.COMPUTE, LaneName.DISK_READ
        lanes: dict[LaneName, Lane] = {
            name: ThreadLane(name, beside_compute=True) for name in LaneName if name not in (inline, disk)
        }
        return Lanes(lanes | {inline: InlineLane(inline), disk: DiskLane(disk)})

    def to_device(self, target: Tensor, source: Tensor) -> None:
        if not (target.is_contiguous() and source.is_contiguous() and target.nbytes == source.nbytes):
            raise ValueError(f"a link carries equal contiguous bytes, not {source.shape} to {target.shape}")
        began = self.pace.clock() if self.pace else 0.0
        # One thread and no GIL, as a DMA engine would: torch's own copy takes every core.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
        if self.pace:
            self.pace.wait(began, source.nbytes)

    from_device = to_device


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
                f"{purpose} needs {format_bytes(nbytes)} of {self.device}, where less is free now "
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
        self.memory = CudaStore(self.torch_device, memory)
        with self.active():
            torch.cuda.init()  # resetting the peak does not, and knows no device before
            torch.cuda.reset_peak_memory_stats(self.torch_device)
            total = torch.cuda.get_device_properties(self.torch_device).total_memory
            self._reserve = int(min(memory or total, total) * _RESERVE)
            self._capped = memory is not None
            if (
                memory is not None
            ):  # the cap holds for torch's temporaries too, not only for what is counted here
                torch.cuda.set_per_process_memory_fraction(min(memory / total, 1.0), self.torch_device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with named_errors(), torch.cuda.device(self.torch_device):
            yield

    def make_lanes(self, host: Store | None = None) -> Lanes:
        lanes: dict[LaneName, Lane] = {LaneName.COMPUTE: StreamLane(LaneName.COMPUTE, self.torch_device)}
        for link in (LaneName.TO_DEVICE, LaneName.FROM_DEVICE):
            lanes[link] = CopyLane(link, self.torch_device, host)
        # Each thread waits for events of this GPU. Where it has not said so, that makes a context on GPU 0.
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
        with contextlib.suppress(RuntimeError), torch.cuda.device(self.torch_device):
            # Of a device that has failed nothing is given back; its error has been raised before.
            torch.cuda.empty_cache()  # what is freed stays torch's own until then
        if self._capped:  # the cap belongs to the process, and may be another's the next time
            self._capped = False
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)

    def settle(self) -> None:
        # Zero-filling runs on the default stream, which the lanes' streams do not wait for.
        torch.cuda.default_stream(self.torch_device).synchronize()

    def wait_for_compute(self) -> None:
        # Asleep, where a stream's own `synchronize` would spin: the cores are for the host's arithmetic.
        end = torch.cuda.Event(blocking=True)
        end.record(torch.cuda.current_stream(self.torch_device))
        end.synchronize()

    def available_bytes(self) -> int | None:
        device = self.torch_device
        with self.active():
            free, _ = torch.cuda.mem_get_info(device)
        # What torch has freed it keeps, and gives again.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        left = super().available_bytes()
        return max((free if left is None else min(free, left)) - self._reserve, 0)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)


def open_device(device: str | torch.device | ComputeDevice) -> ComputeDevice:
    """A compute device from its name.

    "auto" (a GPU where there is one, else "cpu"), "cpu", "cuda", "cuda:1", "emulated", or with limits:
    "emulated:memory=1GiB,link=8GiB,disk=2GiB" (bytes, bytes/s, bytes/s) and "cuda:0,memory=16GiB".
    Raises RequestError for anything else.
    """
    if isinstance(device, ComputeDevice):
        return device
    name = str(device).strip().lower()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return HostDevice()
    kind, _, rest = name.partition(":")
    words = [word for word in rest.split(",") if word]
    index = [word for word in words if word.isascii() and word.isdigit()]
    if kind.startswith("cuda,"):
        words, kind = [*kind.split(",")[1:], *words], "cuda"
    try:
        limits = {k: parse_bytes(v) for k, _, v in (w.partition("=") for w in words if w not in index)}
        if 0 in limits.values():
            raise RequestError(f"device {device!r}: a limit must be more than 0")
        if kind == "emulated" and limits.keys() <= {"memory", "link", "disk"} and not index:
            return EmulatedDevice(**limits)
        if kind == "cuda" and limits.keys() <= {"memory"} and len(index) <= 1:
            return CudaDevice(torch.device("cuda", _gpu_number(index[0]) if index else 0), **limits)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"device {device!r}: {error}") from None
    raise RequestError(
        f"device {device!r} is not known: use 'auto', 'cpu', 'cuda', 'cuda:0', 'emulated' or "
        "'emulated:memory=1GiB,link=8GiB,disk=2GiB'"
    )


def _gpu_number(word: str) -> int:
    """Raises ValueError for a number that torch would not take, or would take for another."""
    number = int(word) if len(word) <= 20 else _GPU_NUMBERS
    if number >= _GPU_NUMBERS:
        raise ValueError(f"a GPU's number is below {_GPU_NUMBERS}; use 'cuda:0' for the first")
    return number


def choose_dtype(asked: str | torch.dtype, checkpoint: torch.dtype, device: ComputeDevice) -> torch.dtype:
    """What to compute in: what is asked for, or for "auto" the device's choice. Raises RequestError for others."""
    if asked == "auto":
        return device.fast_dtype(checkpoint)
    dtype = _DTYPES.get(str(asked).removeprefix("torch."))
    if dtype is None:
        raise RequestError(f"dtype {asked!r} is not supported; use 'auto', {', '.join(map(repr, _DTYPES))}")
    return dtype
