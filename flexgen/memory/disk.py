"""The disk tier: transfers that bypass the page cache, and the files of the offload directory.

Streaming weights through the page cache would copy every byte once more, on the CPU that the arithmetic
wants, and push out pages that other programs need. So files are opened with O_DIRECT and moved in large
aligned chunks, several in flight, by a few threads; where a file system refuses, the same calls run
buffered.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from flexgen.errors import CapacityError, CheckpointError
from flexgen.memory.direct_file import BLOCK, DirectFile
from flexgen.memory.run_folder import RunFolder, mark_in_use, remove_abandoned
from flexgen.units import MIB, align, format_bytes

_MAX_OPEN = 256  # idle files above this are closed, well below the usual limit of 1024 descriptors


@dataclass(frozen=True)
class Read:
    """Fill `target`, a 1-D uint8 view of host memory, from byte `offset` of a file.

    `target` may reach past the end of the file, so that an aligned superset can be asked for; only its
    first `needed` bytes must be there (None: all).
    """

    path: Path
    offset: int
    target: torch.Tensor
    needed: int | None = None


@dataclass(frozen=True)
class Write:
    """Put `source`, a 1-D uint8 view of host memory, at byte `offset` of an existing file."""

    path: Path
    offset: int
    source: torch.Tensor


def aligned_span(offset: int, nbytes: int) -> tuple[int, int, int]:
    """(start, length, lead) of the smallest aligned span over `nbytes` at `offset`, which begin `lead` in."""
    lead = offset % BLOCK
    return offset - lead, align(lead + nbytes, BLOCK), lead


class DiskIO:
    """Reads and writes of many pieces at once, by `threads` threads in chunks of `chunk` bytes.

    Safe to call from several threads. `bandwidth` (bytes/s) slows all transfers together down to that
    of an emulated disk; it may be set at any time. `clock` and `sleep` are replaced in tests.
    """

    def __init__(
        self,
        threads: int = 6,
        chunk: int = 8 * MIB,
        direct: bool = True,
        bandwidth: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if chunk < BLOCK or chunk % BLOCK:
            raise ValueError(f"chunk is {chunk} bytes; it must be a multiple of {BLOCK}")
        self.chunk = chunk
        self.direct = direct
        self.bandwidth = bandwidth
        self._clock = clock
        self._sleep = sleep
        self._idle_from = 0.0  # when the emulated disk has finished all it was given
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="flexgen-disk")
        self._files: OrderedDict[tuple[Path, bool], DirectFile] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._closed = False

    def read(self, reads: Sequence[Read]) -> None:
        """Return when every target is filled.

        Raises CheckpointError for a file that ends before the needed bytes, OSError with the path for
        everything else. After an error nothing writes into the targets any more.
        """
        for read in reads:
            _check(read.path, read.offset, read.target)
            length = read.target.numel()
            if read.needed is not None and not 0 <= read.needed <= length:
                raise ValueError(f"{read.path}: needs {read.needed} bytes of a read of {length}")
        pieces = [(read.path, read.offset, read.target, read.needed) for read in reads]
        self._transfer(pieces, _read_chunk, writable=False)

    def write(self, writes: Sequence[Write]) -> None:
        """Return when every source has been handed to the disk. Raises OSError with the path."""
        for write in writes:
            _check(write.path, write.offset, write.source)
        pieces = [(write.path, write.offset, write.source, None) for write in writes]
        self._transfer(pieces, _write_chunk, writable=True)

    def forget(self, path: Path) -> None:
        """Close `path`, as before it is removed or replaced."""
        with self._lock:
            for writable in (False, True):
                file = self._files.pop((path, writable), None)
                if file is not None and not file.users:
                    file.close()

    def close(self) -> None:
        """Wait for what is under way, end the threads and close all files."""
        self._closed = True
        self._pool.shutdown()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _transfer(
        self,
        pieces: Sequence[tuple[Path, int, torch.Tensor, int | None]],
        move: Callable[[DirectFile, memoryview, int, int], None],
        *,
        writable: bool,
    ) -> None:
        if self._closed:
            raise RuntimeError("this DiskIO is closed")
        started = self._clock()
        total = sum(tensor.numel() for _, _, tensor, _ in pieces)
        files: list[DirectFile] = []
        futures: list[Future[None]] = []
        try:
            for path, offset, tensor, needed in pieces:
                files.append(file := self._acquire(path, writable))
                view = tensor.numpy().data
                needed = len(view) if needed is None else needed
                if total <= self.chunk:  # a hop to another thread would take longer than the transfer gains
                    move(file, view, offset, needed)
                    continue
                for at in range(0, len(view), self.chunk):
                    part = view[at : at + self.chunk]
                    part_needed = min(max(needed - at, 0), len(part))
                    futures.append(self._pool.submit(move, file, part, offset + at, part_needed))
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Also on an interrupt: the caller may free the memory as soon as this returns.
            for future in futures:
                future.cancel()
            wait(futures)
            self._release(files)
        for future in futures:
            if not future.cancelled():
                future.result()
        self._keep_pace(started, total)

    def _keep_pace(self, started: float, nbytes: int) -> None:
        if self.bandwidth is None:
            return
        with self._lock:
            self._idle_from = max(self._idle_from, started) + nbytes / self.bandwidth
            due = self._idle_from
        if (left := due - self._clock()) > 0:
            self._sleep(left)

    def _acquire(self, path: Path, writable: bool) -> DirectFile:
        with self._lock:
            key = (path, writable)
            if key not in self._files:
                self._files[key] = DirectFile(path, writable, self.direct)
            self._files.move_to_end(key)
            self._files[key].users += 1
            return self._files[key]

    def _release(self, files: Iterable[DirectFile]) -> None:
        with self._lock:
            for file in files:
                file.users -= 1
                if not file.users and self._files.get((file.path, file.writable)) is not file:
                    file.close()  # it was forgotten while in use
            idle = [key for key, file in self._files.items() if not file.users]
            for key in idle[: max(len(self._files) - _MAX_OPEN, 0)]:
                self._files.pop(key).close()


class DiskStore:
    """The offload directory: scratch files of this run, and published files that later runs find again.

    Scratch lives in one folder per run, `flexgen-run-<pid>-<random>`, which `close` (or the end of the
    process) removes; a start removes what crashed runs left. Without a `root`, everything is scratch, in
    the system's temporary directory. `used` and `peak` count the bytes of live scratch files.
    """

    def __init__(self, root: Path | None, io: DiskIO) -> None:
        self.root = root
        self.io = io
        self.used = 0
        self.peak = 0
        self._base = Path(tempfile.gettempdir()) if root is None else root
        self._run: RunFolder | None = None
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
            remove_abandoned(root)

    @property
    def free(self) -> int:
        """Bytes this process may still write to the file system of the offload directory."""
        return shutil.disk_usage(self._base).free

    def scratch(self, name: str, nbytes: int) -> Path:
        """A new file of `nbytes` zero bytes, rounded up to whole blocks, its space reserved.

        Raises CapacityError when the file system has less, FileExistsError for a name in use.
        """
        path = _inside(self._run_folder(), name)
        nbytes = align(nbytes, BLOCK)
        if nbytes > self.free:
            raise CapacityError(self._full(path, nbytes))
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _reserve(fd, nbytes)
        except OSError as error:
            path.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CapacityError(self._full(path, nbytes)) from error
            raise
        finally:
            os.close(fd)
        with self._lock:
            self._sizes[path] = nbytes
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        return path

    def release(self, path: Path) -> None:
        """Remove a scratch file, of which no transfer may be under way."""
        with self._lock:
            self.used -= self._sizes.pop(path)
        self.io.forget(path)
        path.unlink()

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
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        _sync_folder(path.parent)
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


def _read_chunk(file: DirectFile, view: memoryview, offset: int, needed: int) -> None:
    got = file.read(view, offset)
    if got < needed:
        raise CheckpointError(
            f"{file.path}: wanted {needed} bytes at offset {offset}, got {got}: the file ends at "
            f"{file.size}; it is truncated or was changed, fetch or write it again"
        )


def _write_chunk(file: DirectFile, view: memoryview, offset: int, needed: int) -> None:
    file.write(view, offset)


def _check(path: Path, offset: int, memory: torch.Tensor) -> None:
    flat = memory.dim() == 1 and memory.is_contiguous()
    if not flat or memory.dtype != torch.uint8 or memory.device.type != "cpu":
        raise ValueError(
            f"{path}: a transfer wants contiguous 1-D uint8 host memory, not "
            f"{memory.dtype} {tuple(memory.shape)} on {memory.device}"
        )
    for name, value in (("offset", offset), ("length", memory.numel()), ("address", memory.data_ptr())):
        if value % BLOCK or value < 0:
            raise ValueError(f"{path}: {name} {value} must be a multiple of {BLOCK}; see aligned_span")


def _inside(folder: Path, name: str) -> Path:
    if not name or name.startswith("/") or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no name for a file in {folder}: it must stay inside")
    return folder / name


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
