"""The machine that runs a model: its compute device and the stores of the three tiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flexgen.errors import RequestError
from flexgen.layout.limits import Limits
from flexgen.memory.cores import use_one_thread_per_core
from flexgen.memory.cpu import HostStore, available_bytes, return_large_memory
from flexgen.memory.device import ComputeDevice
from flexgen.memory.direct_file import fix_for
from flexgen.memory.disk import DiskIO
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.gpu import open_device
from flexgen.memory.lanes import Lanes
from flexgen.memory.store import Store
from flexgen.memory.taken import run_all
from flexgen.memory.throttle import Throttle
from flexgen.policy import Tier

_USABLE = 0.95
"""The share of the free host memory that a memory plan may use. The process itself needs the rest."""
_PINNABLE = 0.8
"""The share of the free host memory that may be pinned. The kernel can neither swap nor move pinned memory, and kills
processes when memory is short."""
PINNED_SHARE = _PINNABLE / _USABLE
"""The share that may be pinned of the host memory that a memory plan may use."""


@dataclass(frozen=True)
class Machine:
    """Provides the memory of every part of a call. `close` frees files, threads and pinned memory."""

    device: ComputeDevice
    host: Store
    disk: DiskStore
    io: DiskIO
    max_memory: Mapping[Tier, int] = field(default_factory=dict)
    """The maximum bytes of each tier. It does not limit tiers that it does not name."""

    @classmethod
    def open(
        cls,
        device: str | torch.device | ComputeDevice,
        offload_dir: str | Path | None = None,
        pin: bool = True,
        max_memory: Mapping[Tier, int] | None = None,
    ) -> Machine:
        """offload_dir: the directory for the files of the disk tier. None creates a temporary directory when
        needed."""
        return_large_memory()
        use_one_thread_per_core()
        compute = open_device(device)
        # If the device computes in host memory, both tiers use one store, and its bytes count once.
        pin_for = compute.torch_device if pin and compute.pinnable else None
        host = compute.memory if compute.shares_host_memory else HostStore(Tier.CPU, pin_for=pin_for)
        io = DiskIO(throttle=Throttle(compute.disk_bandwidth))
        disk = DiskStore(Path(offload_dir) if offload_dir else None, io)
        return cls(compute, host, disk, io, dict(max_memory or {}))

    def limits(self) -> Limits:
        """Bytes that each tier can store, including the bytes in use by this machine; None for no limit.

        Until the next call of this method, the spare buffers of the host stay within these limits too. Raises
        RequestError if the system reports no limit, for example because the offload directory was removed.
        """
        left = None if self.device.shares_host_memory else self.device.available_bytes()
        try:
            available = available_bytes(self.host.cached)
        except OSError as error:
            raise RequestError(
                f"{error.filename}: the free host memory cannot be read: {error.strerror}; {fix_for(error)}"
            ) from error
        free = int(available * _USABLE)
        held = Limits(
            {
                Tier.GPU: None if left is None else left + self.device.memory.used,
                Tier.CPU: free + self.host.used + self.host.spare,
                Tier.DISK: self.disk.free + self.disk.used,
            }
        )
        if self.device.in_host_memory:
            held.host = free + self.host.used + self.device.memory.used
        for tier, most in self.max_memory.items():
            there = held[tier]
            if tier is Tier.DISK:  # published files stay on the disk, in addition to the files of calls
                most = max(most - self.disk.written, 0)
            held[tier] = most if there is None else min(most, there)
        self.host.allow(held[Tier.CPU] or 0, int(available * _PINNABLE) + self.host.pinned)
        return held

    def in_use(self) -> dict[Tier, int]:
        """Bytes of the live buffers of each tier and of the files of calls, without weights on disk."""
        device = 0 if self.device.shares_host_memory else self.device.memory.used
        return {Tier.GPU: device, Tier.CPU: self.host.used, Tier.DISK: self.disk.used}

    def make_lanes(self) -> Lanes:
        """Lanes of its resources, one for every name. The caller must close them before the machine."""
        return self.device.make_lanes(self.host)

    def close(self) -> None:
        run_all([self.io.close, self.disk.close, self.host.close, self.device.close])
