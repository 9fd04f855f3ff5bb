"""Folders that several processes use. A process may remove a folder that no other process uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def use_folder(path: Path, make: bool) -> int | None:
    """A descriptor that protects `path` from `remove_unused` until it is closed or the process ends.

    make: whether to create a missing folder. Without it, the result is None for a missing folder. Raises OSError.
    """
    while True:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, _FLAGS)
        except FileNotFoundError:
            if make:  # another process removed it between the two calls
                continue
            return None
        try:
            # On a file system without locks, `remove_unused` removes nothing, so no lock is needed.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was removed before the lock was taken


def remove_unused(path: Path) -> bool:
    """Remove this user's folder with its contents unless a process uses it. Returns whether it was removed."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_uid != os.getuid() or not _is_at(fd, path):
            return False
        shutil.rmtree(path)
        return True
    except OSError:  # in use, no locks on this file system, or no permission
        return False
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
