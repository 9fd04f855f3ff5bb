"""The CPU tier: host memory, pinned if a GPU copies from it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import os
from pathlib import Path

import psutil
import torch
from torch import Tensor

from flexgen.errors import CapacityError
from flexgen.memory.control_groups import control_groups
from flexgen.memory.cores import usable_cores
from flexgen.memory.numa import interleave
from flexgen.memory.pinning import Pinning
from flexgen.memory.store import Store
from flexgen.policy import Tier
from flexgen.units import MIB, format_bytes

try:
    import resource
except ImportError:  # only on Unix
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# torch reads it before its first allocation: its temporaries of at least 2 MiB use huge pages. A prefill with small
# pages spends several percent of its time on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_ROOT = Path("/")
_LIMIT_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}
"""The files of a control group with its limit and its use, by version."""
_M_MMAP_THRESHOLD = -3  # malloc.h
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # mman.h of Linux
_HUGE = 4 * MIB
"""Bytes. Buffers of at least this size use huge pages."""
_LARGE = 2 * MIB
"""Bytes. Temporaries of at least this size get their own mapping. A decode step makes few of them. All temporaries
of a prefill are larger, including the pieces of 3 and 4 MB that products widen (`kernels.half_linear`)."""


class HostStore(Store):
    """Page-aligned anonymous memory.

    The store maps its memory itself. torch's pinned allocator rounds sizes up to powers of two, and pinning with
    `cudaHostAlloc` is several times slower than to map memory, touch it with several threads and register it. Large
    buffers use huge pages. If the driver refuses the registration (limits, some virtual machines), or the buffer
    exceeds the limit of `allow`, the store logs a warning and uses the buffer unpinned: the store is `pageable`.

    Pinning a buffer takes longer than filling it, so the store keeps released pinned buffers for later buffers of the
    same size, within the limits of `allow`. `spare` counts the bytes of these buffers; `used` excludes them.
    """

    def __init__(
        self, tier: Tier = Tier.CPU, capacity: int | None = None, pin_for: torch.device | None = None
    ) -> None:
        """pin_for: the GPU for which memory is pinned, or None for pageable memory."""
        super().__init__(tier, capacity)
        self._pinning = Pinning(pin_for) if pin_for is not None and torch.cuda.is_available() else None
        self.pageable = self._pinning is None
        self._nodes = usable_cores().nodes
        self._spare: dict[int, int] = {}  # address to bytes, oldest first
        self._by_need: dict[int, mmap.mmap] = {}  # by address
        self._most_held: float = 0
        self._most_pinned: float = math.inf

    @property
    def spare(self) -> int:
        return sum(self._spare.values())

    @property
    def pinned(self) -> int:
        return self._pinning.nbytes if self._pinning is not None else 0

    def allow(self, held: int, pinned: int) -> None:
        """See `Store.allow`. Before the first call, the store keeps no spare buffers and pins all buffers."""
        self._most_held, self._most_pinned = held, pinned

    def _make(self, nbytes: int, purpose: str, copied_by_device: bool) -> Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        pinning = self._pinning if copied_by_device else None
        if pinning is not None:
            for address, size in self._spare.items():
                if size == nbytes:
                    buffer = torch.frombuffer(pinning.mapping(address), dtype=torch.uint8).zero_()
                    del self._spare[address]
                    return buffer
        self._drop_spare(self._most_held - self.used - nbytes)
        if pinning is not None:
            self._drop_spare(self._most_pinned - self.pinned + self.spare - nbytes)
        mapping = self._map(nbytes, purpose)
        buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        if pinning is not None:
            buffer.zero_()  # all threads touch it: the registration touches pages with only one thread
            self._pin(pinning, buffer.data_ptr(), mapping, purpose)
        return buffer

    def _drop_spare(self, most: float) -> None:
        """Free spare buffers, oldest first, until at most `most` bytes remain."""
        while self._pinning is not None and self._spare and self.spare > most:
            address = next(iter(self._spare))
            self._pinning.unpin(address)
            del self._spare[address]

    def _make_by_need(self, nbytes: int, purpose: str, copied_by_device: bool) -> Tensor:
        """Address space. The system provides a page of memory when it is first written. It is never pinned, because a
        registration takes all pages."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if copied_by_device and self._pinning is not None:
            self.pageable = True
        mapping = self._map(nbytes, purpose, _NO_RESERVE)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # one written byte would take a huge page
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
        buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        self._by_need[buffer.data_ptr()] = mapping
        return buffer

    def clear(self, buffer: Tensor) -> None:
        for address, mapping in self._by_need.items():
            begin = buffer.data_ptr() - address
            if 0 <= begin < len(mapping):
                whole = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
                end = max((begin + buffer.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE, whole)
                if end > whole:
                    mapping.madvise(mmap.MADV_DONTNEED, whole, end - whole)  # it reads as zeros then
                buffer[: whole - begin].zero_()
                buffer[end - begin :].zero_()
                return
        buffer.zero_()

    def _map(self, nbytes: int, purpose: str, more_flags: int = 0) -> mmap.mmap:
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | more_flags)
        except OSError as error:
            raise CapacityError(
                f"{purpose} needs {format_bytes(nbytes)} of host memory, but the system cannot allocate it: "
                f"{error.strerror}. Raise the address space limit of the process (ulimit -v), put a smaller share "
                "on the cpu tier, or use smaller batches"
            ) from error
        if nbytes >= _HUGE:
            if not more_flags and hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)
            interleave(mapping, self._nodes)
        return mapping

    def _pin(self, pinning: Pinning, address: int, mapping: mmap.mmap, purpose: str) -> None:
        slow, size = "transfers from pageable memory are slower", format_bytes(len(mapping))
        if pinning.nbytes + len(mapping) > self._most_pinned:
            self.pageable = True
            logger.warning(
                "%s: cannot pin %s; %s. %s of at most %s are pinned: pinned memory cannot be swapped, "
                "so the system needs the rest. Put a smaller share on the cpu tier, or use smaller batches",
                purpose,
                size,
                slow,
                format_bytes(pinning.nbytes),
                format_bytes(int(self._most_pinned)),
            )
        elif status := pinning.pin(address, mapping):
            self.pageable = True
            logger.warning(
                "%s: cannot pin %s (CUDA error %d); %s. Raise the limit of locked memory (ulimit -l) or set "
                "pin_weight = false",
                purpose,
                size,
                status,
                slow,
            )

    def _free(self, buffer: Tensor) -> None:
        address = buffer.data_ptr()
        self._by_need.pop(address, None)
        if self._pinning is not None and self._pinning.has(address):
            self._spare[address] = buffer.nbytes
            self._drop_spare(max(self._most_held - self.used + buffer.nbytes, 0))  # `used` still includes it

    def close(self) -> None:
        self._spare.clear()
        self._by_need.clear()
        if self._pinning is not None:
            self._pinning.close()
        super().close()


def return_large_memory() -> None:
    """Make the process return freed memory to the system immediately, for allocations of at least 2 MiB.

    By default, glibc raises this size with each large tensor that is freed, up to 32 MiB (mallopt(3)). The tensors
    of a prefill are then allocated in its heap, which keeps holes of hundreds of megabytes that no memory plan
    counts. With 4 MiB, some runs still keep 60 MB of holes.
    """
    with contextlib.suppress(AttributeError):  # only in glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def available_bytes(cached: int = 0) -> int:
    """Host memory in bytes that this process can allocate now: the free memory of the system, limited by the cgroup
    and by the address space limit.

    Memory that this process has freed counts as free, including memory that the C library still holds. The page cache
    counts as free too, except for `cached` bytes of it: parts of mapped files that this process needs.
    """
    with contextlib.suppress(AttributeError):  # only in glibc
        ctypes.CDLL(None).malloc_trim(0)
    system, group, addresses = int(psutil.virtual_memory().available), _cgroup_left(), _address_space_left()
    free = system if group is None else min(system, group)
    left = max(free - cached, 0)
    return left if addresses is None else min(left, addresses)


def _address_space_left() -> int | None:
    """Bytes left within the address space limit (RLIMIT_AS, `ulimit -v`), or None without a limit."""
    if resource is None:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    return max(most - int(psutil.Process().memory_info().vms), 0)


def _cgroup_left() -> int | None:
    """Bytes left within the memory limits of this process's control groups, or None without a limit."""
    left: list[int] = []
    for folder, version in control_groups("memory", _ROOT):
        limit, usage = _LIMIT_FILES[version]
        try:
            most = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
            cache = _page_cache(folder)
        except (OSError, ValueError):
            continue
        if most != "max":
            left.append(max(int(most) - used + cache, 0))
    return min(left, default=None)


def _page_cache(folder: Path) -> int:
    """Bytes of page cache that a control group and its children use. The kernel reclaims them when memory is short.

    They include the active pages: a file that is read twice is active, but the kernel can reclaim it. They exclude
    tmpfs.
    """
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    kinds = "inactive_file", "active_file"
    # In version 1, the `total_` fields include the child groups, like the usage and the limit.
    return sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in kinds)


def resident_bytes() -> int:
    """The present resident set of this process, in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def peak_resident_bytes() -> int:
    """The peak resident set of this process in bytes, from the kernel (0 if the kernel does not count it)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_resident_bytes() -> int:
    """Reset the peak resident set, if the kernel allows it. Returns the present resident set, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return resident_bytes()
