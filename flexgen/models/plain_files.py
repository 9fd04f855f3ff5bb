"""Files that can be read: not a link to nothing, a FIFO, or a pointer to the file itself."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexgen.errors import CheckpointError, shown_path

_POINTER = b"version https://git-lfs.github.com/spec/"

_FIXES = {
    errno.EMFILE: "too many files are open: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.EIO: "the disk reports a failure: read the system's log, and copy or download the file again",
    errno.ENOENT: "copy or download it again, or name the folder that holds it",
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Check `path` as `check_file` does, and raise CheckpointError for an OSError within.

    It names `path`, the cause and the fix.
    """
    try:
        check_file(path)
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "give a file that you may read")
        raise CheckpointError(
            f"{shown_path(path)}: cannot be read: {error.strerror or error}; {fix}"
        ) from error


def check_file(path: Path) -> None:
    """Raises CheckpointError unless `path` leads to a regular file that is not a Git LFS pointer.

    Nothing else is opened: opening a FIFO would wait for a writer.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which is missing: the download was interrupted, or the "
                "cache was cleaned. Download the model again"
            ) from None
        raise CheckpointError(f"{path} is missing. Copy or download it again") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise CheckpointError(f"{shown_path(path)} cannot be opened: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise CheckpointError(f"{path} is {kind}; expected a regular file")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in {path.parent}, or download "
                "the file from the hub"
            )
