"""Folders and partial files that must not outlive their run, even when the run crashes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import weakref
from pathlib import Path


class RunFolder:
    """The scratch folder of one run, locked as long as the run lives."""

    def __init__(self, base: Path) -> None:
        self.path = base / f"flexgen-run-{os.getpid()}-{secrets.token_hex(4)}"
        self.path.mkdir(mode=0o700)
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        mark_in_use(fd)
        # A finalizer also runs at exit, so that a store nobody closed leaves nothing behind.
        self.remove = weakref.finalize(self, _remove_run, self.path, fd, os.getpid())


def _remove_run(path: Path, fd: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not take the files from its parent
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def mark_in_use(fd: int) -> None:
    # Beside the process id, because that says nothing to a container that shares the directory. The lock
    # ends with the process. Some file systems have none; there the process id must do.
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_abandoned(base: Path) -> None:
    """Remove run folders and partial files in `base` whose process is gone."""
    for path in base.glob("flexgen-*"):
        match = re.fullmatch(r"flexgen-(?:run|part)-(\d+)-\w+", path.name)
        if match and not _process_lives(int(match[1])) and not _is_marked(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _is_marked(path: Path) -> bool:
    """Whether another process holds the lock of `path`, or it is not ours to judge."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        if os.fstat(fd).st_uid != os.getuid():
            return True
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks here: the process id has decided
    finally:
        os.close(fd)
    return False
