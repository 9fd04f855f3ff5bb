"""Checks that a path is a readable file, not a broken link, a FIFO or a Git LFS pointer."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexgen.errors import CheckpointError, shown_path

_POINTER = b"version https://git-lfs.github.com/spec/"

_FIXES = {
    errno.EMFILE: "too many open files: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine: close some",
    errno.EIO: "the disk reports an error: check the system's log, and copy or download the file again",
    errno.ENOENT: "copy or download it again, or give the folder that contains it",
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Call `check_file(path)`, and turn an OSError in the body into a CheckpointError with path, cause and fix."""
    with explaining(path):
        check_file(path)
        yield


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn an OSError in the body, which reads a file or lists a directory, into a CheckpointError with the fix."""
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "give a file that you have permission to read")
        raise CheckpointError(
            f"{shown_path(path)}: cannot be read: {error.strerror or error}; {fix}"
        ) from error


def read_into(out: memoryview, path: Path, offset: int, key: str) -> None:
    """Fill `out` with bytes of the weight `key`, from `offset` of the file on.

    Raises CheckpointError if the file cannot be read or ends before.
    """
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(out):  # one read returns at most 2 GiB
            count = file.readinto(out[done:])
            if not count:
                raise CheckpointError(
                    f"{path}: the file ends within {key}: it has changed since it was opened. Open the model again"
                )
            done += count


def check_file(path: Path) -> None:
    """Raises CheckpointError unless `path` is, or links to, a regular file that is not a Git LFS pointer.

    Other files are not opened: opening a FIFO would wait for a writer.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which does not exist: the download was interrupted, or the "
                "cache was cleaned. Download the model again"
            ) from None
        raise CheckpointError(f"{path} does not exist. Copy or download it again") from None
    except (OSError, ValueError) as error:  # ValueError for a null character in the name
        raise CheckpointError(f"{shown_path(path)} cannot be opened: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise CheckpointError(f"{path} is {kind}; give a regular file")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in {path.parent}, or download "
                "the file from the hub"
            )
