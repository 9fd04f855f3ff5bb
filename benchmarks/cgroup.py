"""A memory limit that the page cache counts towards: processes of one control group, v1 or v2 (Linux, as root)."""

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
    """What a version of the interface calls its files."""

    limit: str
    peak: str
    events: str
    swap: tuple[tuple[str, str], ...]
    """Files that keep processes from the swap, and what is written there."""


_V1 = _Files(
    "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control", (("memory.swappiness", "0"),)
)
_V2 = _Files("memory.max", "memory.peak", "memory.events", (("memory.swap.max", "0"),))


class MemoryGroup:
    """A control group that holds its processes, and what they read through the page cache, to `limit` bytes.

    A context manager: leaving it removes the group, whose processes must be over. OSError, with the reason,
    where none can be made.
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
                with contextlib.suppress(OSError):  # a kernel without swap accounting
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
        for _ in range(50):  # a process that was killed takes a moment to leave
            try:
                self.path.rmdir()
            except OSError:
                time.sleep(0.1)
            else:
                return
        print(f"{self.path}: cannot be removed, a process is still in it", file=sys.stderr)

    def command(self, words: list[str]) -> list[str]:
        """The command that runs `words` as a process of the group from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.path), *words]

    @property
    def peak_bytes(self) -> int | None:
        """Most that was charged at once, page cache included; None where the kernel does not say."""
        try:
            return int((self.path / self._files.peak).read_text())
        except OSError:
            return None

    @property
    def kills(self) -> int:
        """Processes that the kernel killed because the group was full."""
        try:
            lines = (self.path / self._files.events).read_text().splitlines()
        except OSError:
            return 0
        return sum(int(count) for key, count in map(str.split, lines) if key == "oom_kill")


def drop_caches() -> bool:
    """Empty the system's page cache, so that files are read from the disk; whether that was allowed."""
    os.sync()
    try:
        _CACHES.write_text("1")
    except OSError:
        return False
    return True


def _hierarchy() -> tuple[Path, _Files]:
    """The folder in which a memory group can be made, and what its files are called."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(folder), _V1
    for _, folder, kind, *_ in mounts:
        root = Path(folder)
        if kind == "cgroup2" and "memory" in (root / "cgroup.controllers").read_text().split():
            (root / "cgroup.subtree_control").write_text("+memory")
            return root, _V2
    raise OSError("no control groups of memory are mounted")
