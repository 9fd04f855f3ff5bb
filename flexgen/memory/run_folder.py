"""Folders and partial files that must not outlive their run, even when the run crashes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

_NAME = re.compile(r"flexgen-(run|part)-(\d+)-\w+")


class RunFolder:
    """The scratch folder of one run, locked until the run ends."""

    def __init__(self, base: Path) -> None:
        while True:
            self.path = base / f"flexgen-run-{os.getpid()}-{secrets.token_hex(4)}"
            self.path.mkdir(mode=0o700)
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:  # a starting process removed it before it was locked
                continue
            except BaseException:
                self.path.rmdir()
                raise
            # A finalizer also runs at exit, so that an unclosed store leaves no files behind.
            self.remove = weakref.finalize(self, _remove_run, self.path, fd, os.getpid())
            if _lock(fd, self.path):
                return
            self.remove()


def _remove_run(path: Path, fd: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not remove the files of its parent
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def make_partial(folder: Path) -> tuple[int, Path]:
    """Create a file in `folder`, open for writing and locked. After a crash, `remove_abandoned` removes it."""
    while True:
        fd, name = tempfile.mkstemp(prefix=f"flexgen-part-{os.getpid()}-", dir=folder)
        if _lock(fd, Path(name)):
            return fd, Path(name)
        os.close(fd)
        Path(name).unlink(missing_ok=True)


def _lock(fd: int, path: Path) -> bool:
    """Lock a new file or folder. Returns False if a starting process removed it as abandoned before the lock.

    A process id is not enough: ids are reused, and are meaningless to a container that shares the directory. The lock
    ends with the process. On a file system without locks, the process id decides.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_abandoned(base: Path) -> None:
    """Remove this user's run folders and partial files in `base` whose process has ended.

    Other entries with such a name (a FIFO, a link, a file of another user) are ignored and never opened, so
    other users cannot delay a start through a shared directory. Raises OSError if `base` cannot be listed.
    """
    with os.scandir(base) as entries:
        found = [(Path(entry.path), match) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    for path, match in found:
        kind = stat.S_IFDIR if match[1] == "run" else stat.S_IFREG
        with contextlib.suppress(OSError):  # already removed, or without permission
            _remove_if_abandoned(path, kind, int(match[2]))


def _remove_if_abandoned(path: Path, kind: int, pid: int) -> None:
    if not _is_own(os.lstat(path), kind):
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not _is_own(os.fstat(fd), kind):  # it was replaced between the two calls
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # no locks on this file system
            if _process_lives(pid):
                return
        if kind == stat.S_IFDIR:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _is_own(status: os.stat_result, kind: int) -> bool:
    return stat.S_IFMT(status.st_mode) == kind and status.st_uid == os.getuid()


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
