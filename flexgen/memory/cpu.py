"""The CPU tier: host memory, pinned when there is a device to feed."""

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
from flexgen.memory.pinning import Pinning
from flexgen.memory.store import Store
from flexgen.policy import Tier
from flexgen.units import MIB, format_bytes

try:
    import resource
except ImportError:  # of Unix only
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # malloc.h
_HUGE = 4 * MIB
"""Buffers from here on are worth huge pages."""
_LARGE = 2 * MIB
"""Temporaries from here on get a mapping of their own: a decode step makes few of them, a prefill nothing else, the
pieces of 3 and 4 MB that products widen included (`kernels.half_linear`)."""


class HostStore(Store):
    """Page-aligned anonymous memory.

    Mapped by ourselves, not by torch: its pinned allocator rounds up to powers of two, and memory that is
    mapped, touched by several threads and then registered is pinned several times faster than
    `cudaHostAlloc` does it. Large buffers ask for huge pages. Where the driver refuses to register
    (limits, some virtual machines), or more would be pinned than `allow` has allowed, a warning says so, and the
    buffer is used as it is: the store is `pageable`.

    Pinning takes longer than filling, so a pinned buffer that is released is kept for the next one of its size, as
    far as that was allowed. `spare` counts the bytes kept so, which are not among those `used`.
    """

    def __init__(
        self, tier: Tier = Tier.CPU, capacity: int | None = None, pin_for: torch.device | None = None
    ) -> None:
        """`pin_for`: the GPU that memory is pinned for; None leaves all of it pageable."""
        super().__init__(tier, capacity)
        self._pinning = Pinning(pin_for) if pin_for is not None and torch.cuda.is_available() else None
        self.pageable = self._pinning is None
        self._spare: dict[int, int] = {}  # bytes by address, the oldest first
        self._most_held: float = 0
        self._most_pinned: float = math.inf

    @property
    def spare(self) -> int:
        return sum(self._spare.values())

    @property
    def pinned(self) -> int:
        return self._pinning.nbytes if self._pinning is not None else 0

    def allow(self, held: int, pinned: int) -> None:
        """As `Store.allow`. Before the first call it keeps no spare ones, and pins all."""
        self._most_held, self._most_pinned = held, pinned

    def _make(self, nbytes: int, purpose: str, copied_by_device: bool) -> Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        pinning = self._pinning if copied_by_device else None
        if pinning is not None:
            for address, kept in self._spare.items():
                if kept == nbytes:
                    buffer = torch.frombuffer(pinning.mapping(address), dtype=torch.uint8).zero_()
                    del self._spare[address]
                    return buffer
        self._drop_spare(self._most_held - self.used - nbytes)
        if pinning is not None:
            self._drop_spare(self._most_pinned - self.pinned + self.spare - nbytes)
        mapping = self._map(nbytes, purpose)
        buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        if pinning is not None:
            buffer.zero_()  # touched by all threads: registering untouched pages takes one
            self._pin(pinning, buffer.data_ptr(), mapping, purpose)
        return buffer

    def _drop_spare(self, most: float) -> None:
        """Give spare buffers back, the oldest first, until they have at most `most` bytes."""
        while self._pinning is not None and self._spare and self.spare > most:
            address = next(iter(self._spare))
            self._pinning.unpin(address)
            del self._spare[address]

    def _map(self, nbytes: int, purpose: str) -> mmap.mmap:
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise CapacityError(
                f"{purpose} needs {format_bytes(nbytes)} of host memory, which the system does not give: "
                f"{error.strerror}. Raise the limit of the process's address space (ulimit -v), put a smaller share "
                "on the cpu tier, or use smaller batches"
            ) from error
        if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    def _pin(self, pinning: Pinning, address: int, mapping: mmap.mmap, purpose: str) -> None:
        slow, size = "transfers from pageable memory are slower", format_bytes(len(mapping))
        if pinning.nbytes + len(mapping) > self._most_pinned:
            self.pageable = True
            logger.warning(
                "%s: cannot pin %s; %s. %s of the %s that may be pinned are: pinned memory cannot be swapped, "
                "so some must be left to the system. Put a smaller share on the cpu tier, or use smaller batches",
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
        if self._pinning is not None and self._pinning.has(address):
            self._spare[address] = buffer.nbytes
            self._drop_spare(
                max(self._most_held - self.used + buffer.nbytes, 0)
            )  # it is still among those used

    def close(self) -> None:
        self._spare.clear()
        if self._pinning is not None:
            self._pinning.close()
        super().close()


def return_large_memory() -> None:
    """From here on, what is freed of at least 2 MiB goes back to the system at once, in the whole process.

    glibc raises that size with each large tensor that is freed, up to 32 MiB (mallopt(3)): the tensors of a prefill
    then lie in its heap, whose holes it keeps, hundreds of megabytes that no plan knows of. From 4 MiB on it would
    still keep 60 MB of holes, in some runs and not in others.
    """
    with contextlib.suppress(AttributeError):  # of glibc only
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def available_bytes() -> int:
    """Host memory that can be taken now: what the system has free, and at most what a cgroup and the limit of the
    process's address space leave.

    What this process has freed counts as free: the C library would keep some of it as its own.
    """
    with contextlib.suppress(AttributeError):  # of glibc only
        ctypes.CDLL(None).malloc_trim(0)
    left = (int(psutil.virtual_memory().available), _cgroup_left(), _address_space_left())
    return min(count for count in left if count is not None)


def _address_space_left() -> int | None:
    """Bytes up to the limit of this process's address space (RLIMIT_AS, `ulimit -v`), or None without one."""
    if resource is None:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    return max(most - int(psutil.Process().memory_info().vms), 0)


def _cgroup_left() -> int | None:
    """Bytes up to the memory limit of this process's control group (v2 or v1), or None without one.

    The limits of the groups around it count too: some systems set them there only.
    """
    groups = Path("/proc/self/cgroup")
    if not groups.exists():
        return None
    left: list[int] = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = Path(root + path)  # inside a container it may not be visible; the root's limit is then its own
        for folder in (own, *own.parents):
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
    """Bytes of page cache charged to a control group and those in it: the kernel gives them up when asked.

    Active or not: a file that is read twice is active, and no less reclaimable. Memory of a tmpfs is not among them.
    """
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    kinds = "inactive_file", "active_file"
    # Of the first version `total_` counts the groups within, as the usage and the limit do.
    return sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in kinds)


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, by the kernel's account (0 where it keeps none)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_resident_bytes() -> int:
    """Begin a new account of the largest resident set, where the kernel allows it; returns the present one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return resident_bytes()
