"""The processor cores that this process may use, and the number of threads that compute.

torch's own choice can be larger: it does not know the CPU quota of a control group, and some of its builds count
hardware threads. Those of one core share its vector units, its caches and its path to memory, so the second one makes
products no faster. More threads than the quota allows are stopped together in each period of the quota.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgen.memory.control_groups import control_groups
from flexgen.results.threads import ThreadCounts

_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables with which users choose the number of threads of torch."""
_DEFAULT = torch.get_num_threads()
"""torch's number of threads when this module is imported."""
_ROOT = Path("/")


@dataclass(frozen=True)
class Cores:
    """What the affinity of this process (`taskset`, cpusets) and the quotas of its control groups leave of a machine.

    cpus: hardware threads. cores: physical cores with one of them. nodes: the numbers of their NUMA nodes.
    quota: seconds of CPU time per second, or None for no limit.
    """

    cpus: int
    cores: int
    nodes: tuple[int, ...]
    quota: float | None = None

    @property
    def threads(self) -> int:
        """The number of threads to compute with: one for each core, within the quota."""
        return self.cores if self.quota is None else max(min(self.cores, int(self.quota)), 1)


def usable_cores(root: Path | None = None, cpus: frozenset[int] | None = None) -> Cores:
    """The cores of this process. Facts that the system does not tell count as one hardware thread for each core, and
    as one NUMA node.

    root: the folder with `proc` and `sys`. cpus: the numbers of the hardware threads that the process may use.
    """
    root = root or _ROOT
    cpus = cpus or _affinity()
    cores = {_siblings(root, cpu) for cpu in cpus}
    return Cores(len(cpus), len(cores), _nodes(root, cpus), _quota(root))


def use_one_thread_per_core() -> None:
    """Let torch, and the kernels of flexgen with it, compute with `Cores.threads` threads in this process.

    The user's own choice has priority: OMP_NUM_THREADS, MKL_NUM_THREADS, or a call of `torch.set_num_threads` after
    flexgen was imported. The number is never raised.
    """
    chosen = any(os.environ.get(name) for name in _CHOSEN_BY) or torch.get_num_threads() != _DEFAULT
    if not chosen and (threads := usable_cores().threads) < _DEFAULT:
        torch.set_num_threads(threads)


def thread_counts(disk: int) -> ThreadCounts:
    """The threads of this process, for its reports. disk: those that read and write files."""
    found = usable_cores()
    return ThreadCounts(torch.get_num_threads(), found.cores, found.cpus, len(found.nodes), disk)


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _siblings(root: Path, cpu: int) -> frozenset[int]:
    """The hardware threads of a core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the older name
        if found := _listed(topology / name):
            return found
    return frozenset((cpu,))


def _nodes(root: Path, cpus: frozenset[int]) -> tuple[int, ...]:
    """The NUMA nodes with one of the hardware threads, in which this process may use memory."""
    folder = root / "sys/devices/system/node"
    numbers = sorted(int(path.name[4:]) for path in folder.glob("node*") if path.name[4:].isdecimal())
    near = [number for number in numbers if _listed(folder / f"node{number}/cpulist") & cpus]
    allowed = _memory_nodes(root)
    return tuple(number for number in near if number in allowed or not allowed) or (0,)


def _memory_nodes(root: Path) -> frozenset[int]:
    """The NUMA nodes whose memory this process may use; empty if the system does not tell."""
    try:
        status = (root / "proc/self/status").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^Mems_allowed_list:\s*(\S+)", status, re.MULTILINE)
    return frozenset(_numbers(found[1])) if found else frozenset()


def _quota(root: Path) -> float | None:
    """Seconds of CPU time per second that the control groups allow, or None without a limit."""
    found = []
    for folder, version in control_groups("cpu", root):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                found.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def _listed(path: Path) -> frozenset[int]:
    """The numbers in a file such as "0-3,8"; none if it is missing or damaged."""
    try:
        return frozenset(_numbers(path.read_text().strip()))
    except (OSError, ValueError):
        return frozenset()


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        yield from range(int(first), int(last if dash else first) + 1)
