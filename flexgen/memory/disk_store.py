"""The offload directory: scratch files of a run, and published files that later runs find again."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from flexgen.errors import CapacityError, RequestError
from flexgen.memory.direct_file import BLOCK
from flexgen.memory.disk import DiskIO
from flexgen.memory.run_folder import RunFolder, mark_in_use, remove_abandoned
from flexgen.units import align, format_bytes


class DiskStore:
    """The offload directory: scratch files of this run, and published files that later runs find again.

    Scratch lives in one folder per run, `flexgen-run-<pid>-<random>`, which `close` (or the end of the
    process) removes; a start removes what crashed runs left. Without a `root`, everything is scratch, in
    the system's temporary directory. `used` and `peak` count the bytes of live scratch files, `written` those of
    the files that this run has published. Raises RequestError for a `root` that is no directory and cannot be made.
    """

    def __init__(self, root: Path | None, io: DiskIO) -> None:
        self.root = root
        self.io = io
        self.used = 0
        self.peak = 0
        self.written = 0
        self._base = Path(tempfile.gettempdir()) if root is None else root
        self._run: RunFolder | None = None
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()
        if root is not None:
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RequestError(
                    f"offload_dir {root} cannot be made: {error.strerror}; give a directory, or where one can be made"
                ) from error
            remove_abandoned(root)

    @property
    def free(self) -> int:
        """Bytes this process may still write to the file system of the offload directory."""
        return shutil.disk_usage(self._base).free

    @property
    def total(self) -> int:
        """Bytes of that file system in all."""
        return shutil.disk_usage(self._base).total

    def scratch(self, name: str, nbytes: int) -> Path:
        """A new file of `nbytes` zero bytes, rounded up to whole blocks, its space reserved.

        Raises CapacityError when the file system has less, FileExistsError for a name in use.
        """
        path = _inside(self._run_folder(), name)
        nbytes = align(nbytes, BLOCK)
        if nbytes > self.free:
            raise CapacityError(self._full(path, nbytes))
        if path in self._sizes:
            raise FileExistsError(errno.EEXIST, "a scratch file of this name is in use", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.io.forget(path)
        path.unlink(missing_ok=True)  # what a release that was interrupted may have left
        try:
            _make(path, nbytes)
            with self._lock:
                self._sizes[path] = nbytes
                self.used += nbytes
                self.peak = max(self.peak, self.used)
        except BaseException as error:  # Ctrl-C, too, must not leave a file that nobody knows of
            if path in self._sizes:
                self.release(path)
            else:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CapacityError(self._full(path, nbytes)) from error
            raise
        return path

    def release(self, path: Path) -> None:
        """Remove a scratch file, of which no transfer may be under way."""
        with self._lock:
            self.used -= self._sizes.pop(path)
        try:
            self.io.forget(path)
        finally:
            path.unlink(missing_ok=True)

    def published(self, name: str) -> Path | None:
        """The file published as `name`, by this run or an earlier one, if there is one."""
        folder = self._run_folder() if self.root is None else self.root
        path = _inside(folder, name)
        return path if path.is_file() else None

    def publish(self, name: str, write: Callable[[BinaryIO], None]) -> Path:
        """Keep what `write` puts into the file it is given as `name`: complete, or not at all.

        An existing file of that name is replaced. After an error in `write` nothing is left of it.
        """
        folder = self._run_folder() if self.root is None else self.root
        path = _inside(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, partial = tempfile.mkstemp(prefix=f"flexgen-part-{os.getpid()}-", dir=folder)
        try:
            with open(fd, "wb") as file:
                mark_in_use(fd)
                write(file)
                file.flush()
                os.fsync(fd)
            nbytes = os.path.getsize(partial)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        _sync_folder(path.parent)
        with self._lock:
            self.written += nbytes
        self.io.forget(path)
        return path

    def close(self) -> None:
        """Remove this run's scratch files and their folder."""
        with self._lock:
            paths, self._sizes, self.used = list(self._sizes), {}, 0
            run, self._run = self._run, None
        for path in paths:
            self.io.forget(path)
        if run is not None:
            run.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_folder(self) -> Path:
        with self._lock:
            if self._run is None:
                if self.root is None:
                    remove_abandoned(self._base)
                self._run = RunFolder(self._base)
            return self._run.path

    def _full(self, path: Path, nbytes: int) -> str:
        return (
            f"{path}: needs {format_bytes(nbytes)} ({nbytes} bytes), but the disk has "
            f"{format_bytes(self.free)} ({self.free} bytes) free: put a smaller share on disk, "
            "or choose an offload directory with more room"
        )


def _inside(folder: Path, name: str) -> Path:
    if not name or name.startswith("/") or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no name for a file in {folder}: it must stay inside")
    return folder / name


def _make(path: Path, nbytes: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _reserve(fd, nbytes)
    finally:
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        # Not every file system can reserve; nor is there anything to reserve for an empty file.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)


def _sync_folder(folder: Path) -> None:
    # The new name itself must reach the disk, or a power failure could undo it.
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
