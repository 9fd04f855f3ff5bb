"""A memory limit that includes the page cache: a control group for processes, v1 or v2 (Linux, as root)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class _Files:
    """The file names of one version of the interface."""

    limit: str
    peak: str
    events: str
    swap: tuple[tuple[str, str], ...]
    """Files that disable swap for the processes, with the values to write."""


_V1 = _Files(
    "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control", (("memory.swappiness", "0"),)
)
_V2 = _Files("memory.max", "memory.peak", "memory.events", (("memory.swap.max", "0"),))


class MemoryGroup:
    """A control group that limits its processes, including their page cache, to `limit` bytes.

    It is a context manager. At the exit, it removes the group, and all processes of the group must have ended. Raises
    OSError, with the reason, if the group cannot be created.
    """

    def __init__(self, limit: int, name: str = "flexgen-benchmark") -> None:
        self.limit = limit
        parent, self._files = _hierarchy()
        self.path = parent / f"{name}-{os.getpid()}"

    def __enter__(self) -> Self:
        self.path.mkdir(exist_ok=True)
        try:
            (self.path / self._files.limit).write_text(str(self.limit))
            for name, value in self._files.swap:
                with contextlib.suppress(OSError):  # the kernel has no swap accounting
                    (self.path / name).write_text(value)
            with contextlib.suppress(OSError):  # v1 counts memory and swap together
                (self.path / "memory.memsw.limit_in_bytes").write_text(str(self.limit))
        except OSError:
            self.path.rmdir()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(50):  # a killed process leaves the group after a short time
            try:
                self.path.rmdir()
            except OSError:
                time.sleep(0.1)
            else:
                return
        print(f"{self.path}: cannot be removed, because a process is still in it", file=sys.stderr)

    def command(self, words: list[str]) -> list[str]:
        """A command that runs `words` in the group from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.path), *words]

    @property
    def peak_bytes(self) -> int | None:
        """The peak memory of the group, including page cache; None if the kernel does not report it."""
        try:
            return int((self.path / self._files.peak).read_text())
        except OSError:
            return None

    @property
    def kills(self) -> int:
        """The number of processes that the kernel killed because the group was out of memory."""
        try:
            lines = (self.path / self._files.events).read_text().splitlines()
        except OSError:
            return 0
        return sum(int(count) for key, count in map(str.split, lines) if key == "oom_kill")


def drop_caches() -> bool:
    """Empty the system's page cache, so that files are read from disk. Returns whether this was permitted."""
    os.sync()
    try:
        _CACHES.write_text("1")
    except OSError:
        return False
    return True


def _hierarchy() -> tuple[Path, _Files]:
    """The folder in which a memory group can be created, and the names of its files."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(folder), _V1
    for _, folder, kind, *_ in mounts:
        root = Path(folder)
        if kind == "cgroup2" and "memory" in (root / "cgroup.controllers").read_text().split():
            (root / "cgroup.subtree_control").write_text("+memory")
            return root, _V2
    raise OSError("no memory control groups are mounted")
