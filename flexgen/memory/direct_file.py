"""An open file whose transfers bypass the page cache if the file system supports it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flexgen.units import BLOCK

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # not available on every system


def fix_for(error: OSError, writable: bool = True) -> str:
    """The fix that an error message gives for an error of the file system.

    writable: whether the file is in the offload directory. Other files, such as those of a checkpoint, are only read.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: close some, or raise the limit (ulimit -n)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or give an offload_dir with more room"
    if error.errno == errno.EFBIG:
        return "raise the file size limit (ulimit -f), or give an offload_dir on another file system"
    if error.errno == errno.EIO:
        other = "give another offload_dir" if writable else "copy or download the file again, to another disk"
        return f"the disk reports a failure: read the system log, and {other}"
    if error.errno == errno.ENOENT and not writable:
        return "it was removed while the model was open: copy or download it again, and open the model again"
    if error.errno == errno.ENOENT:
        return "it was removed while the model was open: open the model again"
    if not writable:
        return "give a file that you have permission to read"
    return "give an existing offload_dir that you have permission to write to"


class _Handle(NamedTuple):
    fd: int
    direct: bool


class DirectFile:
    """An open file that uses direct transfers, and permanently falls back to buffered ones if these are refused.

    A refusal is EINVAL, from open (tmpfs and others) or from the first transfer (some network and stacked
    file systems, devices with larger blocks). Python itself resumes interrupted calls.
    """

    def __init__(self, path: Path, writable: bool, direct: bool) -> None:
        self.path = path
        self.writable = writable
        self.users = 0
        self._flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._lock = threading.Lock()
        self._retired: list[int] = []  # descriptors that another thread may still use
        self._handle = self._open(direct and _O_DIRECT != 0)

    @property
    def direct(self) -> bool:
        return self._handle.direct

    @property
    def size(self) -> int:
        return os.fstat(self._handle.fd).st_size

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view`. Returns the number of bytes read, which is less than its length if the file ends."""
        done = 0
        while done < len(view):
            count = self._call(os.preadv, view[done:], offset + done)
            done += count
            if count == 0 or (done % BLOCK and offset + done >= self.size):
                break
            if done % BLOCK:  # a short read ended inside a block: a direct read cannot continue there
                self._turn_buffered(self._handle)
        self._leave_cache(offset, done)
        return done

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view`."""
        done = 0
        while done < len(view):
            count = self._call(os.pwritev, view[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"nothing written at offset {offset + done}", str(self.path))
            done += count
            if done % BLOCK:
                self._turn_buffered(self._handle)
        self._leave_cache(offset, done)

    def close(self) -> None:
        for fd in (self._handle.fd, *self._retired):
            os.close(fd)

    def _call(self, move: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int) -> int:
        while True:
            handle = self._handle
            try:
                return move(handle.fd, [view], offset)
            except OSError as error:
                if error.errno == errno.EINVAL and handle.direct:
                    self._turn_buffered(handle)
                    continue
                what = f"{move.__name__} of {len(view)} bytes at offset {offset}"
                message = f"{what}: {error.strerror}; {fix_for(error, self.writable)}"
                raise OSError(error.errno, message, str(self.path)) from error

    def _turn_buffered(self, refused: _Handle) -> None:
        with self._lock:
            if self._handle is refused and refused.direct:
                self._retired.append(refused.fd)
                self._handle = self._open(direct=False)

    def _open(self, direct: bool) -> _Handle:
        if direct:
            try:
                return _Handle(os.open(self.path, self._flags | _O_DIRECT), True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise OSError(
                        error.errno, f"{error.strerror}; {fix_for(error, self.writable)}", str(self.path)
                    ) from error
        try:
            return _Handle(os.open(self.path, self._flags), False)
        except OSError as error:
            message = f"{error.strerror}; {fix_for(error, self.writable)}"
            raise OSError(error.errno, message, str(self.path)) from error

    def _leave_cache(self, offset: int, nbytes: int) -> None:
        # Streamed bytes are not read again soon: they must not evict pages that other programs use.
        handle = self._handle
        if nbytes and not handle.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
