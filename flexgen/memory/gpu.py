"""Opens compute devices, and implements those that compute on the CPU.

`cuda` is a GPU. `cpu` computes in host memory and uses the data of the GPU tier and the CPU tier in place. `emulated`
has a separate part of host memory as device memory, behind links of a given bandwidth. Its moves are real copies, so
that a machine without a GPU exercises all three tiers.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.errors import RequestError, shown
from flexgen.kernels.half_linear import has_products
from flexgen.kernels.linear import has_prelayout, prelayout
from flexgen.kernels.result_memory import RESULT_MEMORY
from flexgen.layout.topology import SHARED
from flexgen.memory.cores import usable_cores
from flexgen.memory.cpu import HostStore
from flexgen.memory.cuda import CudaDevice
from flexgen.memory.device import ComputeDevice
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.lanes import InlineLane, Lane, Lanes, ThreadLane
from flexgen.memory.store import Store
from flexgen.policy import Tier
from flexgen.results.trace import LaneName
from flexgen.units import parse_bytes

_log = logging.getLogger("flexgen")

_GPU_NUMBERS = 128
"""torch.device stores the number as a signed integer of 8 bits."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _HostArithmetic(ComputeDevice):
    """Computes on the CPU, in the thread that issues the steps.

    An order issues the work that a cell overlaps with before the cell computes, so computing in this thread delays
    nothing. A thread of its own would compete with the issuing thread for Python's lock.
    """

    shares_cores = True

    def __init__(self, memory: Store) -> None:
        self.torch_device = torch.device("cpu")
        self.memory = memory

    def fast_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """bfloat16 if the CPU has instructions for it, otherwise float32. On a CPU, float16 products are several
        times slower (benchmarks/host_linear.py measures them)."""
        if checkpoint is not torch.float16:
            return checkpoint
        return torch.bfloat16 if has_products(torch.bfloat16) else torch.float32

    def prelayout(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        return prelayout if has_prelayout(dtype) else None


class HostDevice(_HostArithmetic):
    """The CPU. Its GPU tier is host memory too, so a policy for a GPU runs here unchanged."""

    name = "cpu"
    topology = SHARED

    def __init__(self) -> None:
        super().__init__(HostStore(Tier.CPU))
        self.maps_files = len(usable_cores().nodes) == 1

    def make_lanes(self, host: Store | None = None) -> Lanes:
        lanes: dict[LaneName, Lane] = dict.fromkeys(LaneName, InlineLane(LaneName.COMPUTE))
        lanes[LaneName.DISK_READ] = DiskLane(LaneName.DISK_READ)
        return Lanes(lanes | {LaneName.DISK_WRITE: ThreadLane(LaneName.DISK_WRITE, beside_compute=True)})

    def to_device(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    from_device = to_device

    def begin_call(self, call: Hashable) -> None:
        RESULT_MEMORY.begin(call)

    def end_call(self, call: Hashable) -> None:
        RESULT_MEMORY.end(call)


@dataclass
class Pace:
    """Limits the bandwidth of a link."""

    bandwidth: float
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def wait(self, began: float, nbytes: int) -> None:
        """Wait until `nbytes` / `bandwidth` seconds have passed since `began` (by `clock`)."""
        while (left := began + nbytes / self.bandwidth - self.clock()) > 0:
            self.sleep(left)


class EmulatedDevice(_HostArithmetic):
    """A device of `memory` bytes behind a full-duplex link of `link` bytes/s and a disk of `disk` bytes/s.

    None means no limit. Arithmetic runs on the CPU.
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
            raise ValueError(
                f"a link copies contiguous tensors of equal bytes, not {source.shape} to {target.shape}"
            )
        began = self.pace.clock() if self.pace else 0.0
        # One thread without the GIL, like a DMA engine: torch's copy uses all cores.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
        if self.pace:
            self.pace.wait(began, source.nbytes)

    from_device = to_device


def open_device(device: str | torch.device | ComputeDevice) -> ComputeDevice:
    """Open a compute device by its name.

    device: "auto" (a GPU if there is one, else "cpu"), "cpu", "cuda", "cuda:1", "emulated", or with limits:
    "emulated:memory=1GiB,link=8GiB,disk=2GiB" (bytes, bytes/s, bytes/s) and "cuda:0,memory=16GiB".
    Raises RequestError for any other value.
    """
    if isinstance(device, ComputeDevice):
        return device
    name = str(device).strip().lower() if isinstance(device, str | torch.device) else ""
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
            raise RequestError(f"device {shown(device)}: a limit must be greater than 0")
        if kind == "emulated" and limits.keys() <= {"memory", "link", "disk"} and not index:
            return EmulatedDevice(**limits)
        if kind == "cuda" and limits.keys() <= {"memory"} and len(index) <= 1:
            return CudaDevice(torch.device("cuda", _gpu_number(index[0]) if index else 0), **limits)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"device {shown(device)}: {error}") from None
    raise RequestError(
        f"device {shown(device)} is not known: use 'auto', 'cpu', 'cuda', 'cuda:0', 'emulated' or "
        "'emulated:memory=1GiB,link=8GiB,disk=2GiB'"
    )


def _gpu_number(word: str) -> int:
    """Raises ValueError for a number that torch would reject or wrap around."""
    number = int(word) if len(word) <= 20 else _GPU_NUMBERS
    if number >= _GPU_NUMBERS:
        raise ValueError(f"a GPU's number is below {_GPU_NUMBERS}; use 'cuda:0' for the first")
    return number


def choose_dtype(asked: str | torch.dtype, checkpoint: torch.dtype, device: ComputeDevice) -> torch.dtype:
    """The dtype to compute in: `asked`, or the device's choice for "auto". Raises RequestError for other dtypes."""
    if isinstance(asked, str) and asked == "auto":
        fast = device.fast_dtype(checkpoint)
        if checkpoint is torch.bfloat16 and fast is torch.float16:
            _log.warning(
                "%s has no instructions for bfloat16, the checkpoint's dtype, so the model computes in float16. "
                'Values beyond 65504 become infinite: open the model with dtype="float32" if that happens',
                device.name,
            )
        return fast
    named = isinstance(asked, str | torch.dtype)
    dtype = _DTYPES.get(str(asked).removeprefix("torch.")) if named else None
    if dtype is None:
        raise RequestError(
            f"dtype {shown(asked)} is not supported; use 'auto', {', '.join(map(repr, _DTYPES))}"
        )
    return dtype
