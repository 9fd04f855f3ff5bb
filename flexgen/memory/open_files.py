"""Files that transfers share: opened when first used, and closed when too many others are open."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from flexgen.memory.direct_file import DirectFile


class OpenFiles:
    """Files by path and mode. At most `most` that are not in use stay open: the usual limit of a process is 1024.

    Safe to call from several threads.
    """

    def __init__(self, direct: bool, most: int) -> None:
        self._direct = direct
        self._most = most
        self._files: OrderedDict[tuple[Path, bool], DirectFile] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def acquire(self, path: Path, writable: bool) -> DirectFile:
        """The open file, in use until it is released. Raises OSError."""
        with self._lock:
            key = (path, writable)
            if key not in self._files:
                self._files[key] = DirectFile(path, writable, self._direct)
            self._files.move_to_end(key)
            self._files[key].users += 1
            return self._files[key]

    def release(self, files: Iterable[DirectFile]) -> None:
        with self._lock:
            for file in files:
                file.users -= 1
                if not file.users and self._files.get((file.path, file.writable)) is not file:
                    file.close()  # it was forgotten while in use
            idle = [key for key, file in self._files.items() if not file.users]
            for key in idle[: max(len(self._files) - self._most, 0)]:
                self._files.pop(key).close()

    def forget(self, path: Path) -> None:
        """Close `path`, as before it is removed or replaced."""
        with self._lock:
            for writable in (False, True):
                file = self._files.pop((path, writable), None)
                if file is not None and not file.users:
                    file.close()

    def in_use(self) -> list[DirectFile]:
        """Files that some transfer uses."""
        with self._lock:
            return [file for file in self._files.values() if file.users]

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
