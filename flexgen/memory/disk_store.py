"""The offload directory: scratch files of a run, and published files that later runs reuse."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from flexgen.errors import CapacityError, FlexGenError, RequestError, shown_path
from flexgen.memory.direct_file import fix_for
from flexgen.memory.disk import DiskIO
from flexgen.memory.run_folder import RunFolder, make_partial, remove_abandoned
from flexgen.memory.shared_folder import remove_unused, use_folder
from flexgen.units import BLOCK, align, format_bytes


class DiskStore:
    """The offload directory: scratch files of this run, and published files that later runs reuse.

    Each run stores its scratch files in a folder `flexgen-run-<pid>-<random>`, which `close` (or the end of the
    process) removes. A new run removes the folders of crashed runs. Without a `root`, all files are scratch files in
    the system's temporary directory. `used` and `peak` count the bytes of live scratch files, `written` those of
    the files that this run has published. Raises RequestError if `root` cannot be created, listed or written to.
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
        self._numbers = itertools.count()
        self._in_use: dict[Path, int] = {}  # folders of published files, with the descriptors that lock them
        self._process = os.getpid()
        if root is not None:
            try:
                root.mkdir(parents=True, exist_ok=True)
                remove_abandoned(root)
                fd, path = make_partial(root)
                os.close(fd)
                path.unlink()
            except OSError as error:
                raise RequestError(
                    f"offload_dir {shown_path(root)} cannot be written to: {error.strerror}; give a directory "
                    "that you can write to, or a path where one can be created"
                ) from error

    @property
    def free(self) -> int:
        """Bytes that this process can still write to the file system of the offload directory. Raises RequestError if
        the directory was removed."""
        return self._usage().free

    @property
    def total(self) -> int:
        """The size of that file system in bytes. Raises the errors of `free`."""
        return self._usage().total

    def _usage(self) -> shutil._ntuple_diskusage:
        try:
            return shutil.disk_usage(self._base)
        except OSError as error:
            raise RequestError(
                f"offload_dir {self._base} cannot be used: {error.strerror}. If it was removed while the model was "
                "open, create it again, or open the model again with another offload_dir"
            ) from error

    def scratch(self, name: str, nbytes: int) -> Path:
        """Create a file of `nbytes` zero bytes, rounded up to whole blocks, and reserve its space.

        Its name begins with `name` and is never used twice. Raises CapacityError if the file system has less space,
        and RequestError if the directory cannot be written to.
        """
        return self.make(self.scratch_path(name), nbytes)

    def scratch_path(self, name: str) -> Path:
        """A path for `make` that no other scratch file has ever had."""
        return _inside(self._run_folder(), f"{name}-{next(self._numbers)}" if name else name)

    def make(self, path: Path, nbytes: int) -> Path:
        """Create the file of a `scratch_path`, like `scratch`."""
        nbytes = align(nbytes, BLOCK)
        if nbytes > self.free:
            raise CapacityError(self._full(path, nbytes))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _make(path, nbytes)
            self._count(path, nbytes)
        except BaseException as error:  # Ctrl-C must not leave an unknown file either
            self.release(path)
            if isinstance(error, OSError):
                raise self._refused(error, path, nbytes) from error
            raise
        return path

    def _count(self, path: Path, nbytes: int) -> None:
        peak = max(self.peak, self.used + nbytes)
        # No calls below: Python handles signals only at calls and jumps, so these statements run together or not at
        # all.
        self._sizes[path] = nbytes
        self.used += nbytes
        self.peak = peak

    def release(self, path: Path) -> None:
        """Remove a scratch file if it exists. No transfer may use it."""
        if os.getpid() != self._process:  # a forked child must not remove the files of its parent
            return
        try:
            self.io.forget(path)
        finally:
            try:
                path.unlink(missing_ok=True)
            finally:
                self._uncount(path)

    def _uncount(self, path: Path) -> None:
        nbytes = self._sizes.get(path, 0)
        # As in `_count`: no calls.
        self.used -= nbytes
        if nbytes:
            del self._sizes[path]

    def published(self, name: str) -> Path | None:
        """The file that this run or an earlier one published as `name`, or None. It is a regular file of this
        user."""
        path = _inside(self._published_folder(), name)
        try:
            status = os.lstat(path)
        except OSError:
            return None
        # Earlier runs did not write links, nor files of other users.
        return path if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() else None

    def publish(self, name: str, write: Callable[[BinaryIO], None], expected: int = 0) -> Path:
        """Publish the file that `write` writes as `name`, atomically.

        Replaces an existing file of that name. After an error in `write`, the new file is removed. expected: the
        bytes that `write` will write, for the error message. Raises CapacityError and RequestError for errors of the
        file system, including an OSError of `write`.
        """
        folder = self._published_folder()
        path = _inside(folder, name)
        nbytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, partial = make_partial(folder)
            try:
                with open(fd, "w+b") as file:
                    write(file)
                    file.flush()
                    os.fsync(fd)
                nbytes = partial.stat().st_size
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        except OSError as error:
            raise self._refused(error, path, expected) from error
        with self._lock:
            self.written += nbytes
        self.io.forget(path)
        return path

    def use(self, name: str, make: bool) -> bool:
        """Protect the folder `name` of published files from `remove_unused` in other processes, until `close`.

        Returns whether the folder exists; `make` creates it. Raises the errors of `publish`.
        """
        path = _inside(self._published_folder(), name)
        if path not in self._in_use:
            try:
                fd = use_folder(path, make)
            except OSError as error:
                raise self._refused(error, path, 0) from error
            if fd is None:
                return False
            self._in_use[path] = fd
        return True

    def published_folders(self, name: str, pattern: re.Pattern[str]) -> list[Path]:
        """Folders in the folder `name` of published files whose names match `pattern`."""
        try:
            with os.scandir(_inside(self._published_folder(), name)) as entries:
                return [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
        except OSError:
            return []

    def remove_unused(self, path: Path) -> bool:
        """Remove one of the `published_folders` unless another process uses it. Returns whether it was removed."""
        return path not in self._in_use and remove_unused(path)

    def close(self) -> None:
        """Remove the scratch files of this run and their folder."""
        while self._in_use:
            os.close(self._in_use.popitem()[1])
        for path in list(self._sizes):
            self.release(path)
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            run.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _published_folder(self) -> Path:
        """The folder of published files."""
        return self._run_folder() if self.root is None else self.root

    def _run_folder(self) -> Path:
        with self._lock:
            if self._run is not None and not self._run.path.is_dir():  # another program removed it
                self._run.remove()
                self._run = None
            if self._run is None:
                try:
                    if self.root is None:
                        remove_abandoned(self._base)
                    self._run = RunFolder(self._base)
                except OSError as error:
                    raise self._refused(error, self._base, 0) from error
            return self._run.path

    def _refused(self, error: OSError, path: Path, nbytes: int) -> FlexGenError:
        """The error to raise when the file system refuses a file, with its cause and fix."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CapacityError(self._full(path, nbytes))
        if error.errno == errno.EFBIG:
            return CapacityError(
                f"{path}: {format_bytes(nbytes)} ({nbytes} bytes) in one file exceed the limit of the file system or "
                "the process (ulimit -f): raise the limit, put a smaller share on disk, or choose another "
                "offload directory"
            )
        return RequestError(f"{path} cannot be written: {error.strerror}; {fix_for(error)}")

    def _full(self, path: Path, nbytes: int) -> str:
        return (
            f"{path}: needs {format_bytes(nbytes)} ({nbytes} bytes), but the disk has "
            f"{format_bytes(self.free)} ({self.free} bytes) free: put a smaller share on disk, "
            "or choose an offload directory with more room"
        )


def _inside(folder: Path, name: str) -> Path:
    if not name or name.startswith("/") or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is not a valid file name in {folder}: the path must stay inside it")
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
        # Not every file system can reserve space, and an empty file needs none.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)


def _sync_folder(folder: Path) -> None:
    # The new directory entry must reach the disk too, or a power failure could undo it.
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
