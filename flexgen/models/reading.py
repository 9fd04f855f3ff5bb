"""Errors of the system while a checkpoint is read, as errors that name the file and the fix."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexgen.errors import CheckpointError

_FIXES = {
    errno.EMFILE: "too many files are open: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.EIO: "the disk reports a failure: read the system's log, and copy or download the file again",
    errno.ENOENT: "copy or download it again, or name the folder that holds it",
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise CheckpointError for an OSError: with `path`, the system's word and what to do about it."""
    try:
        yield
    except OSError as error:
        assert error.errno is not None
        fix = _FIXES.get(error.errno, "give a file that you may read")
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {fix}") from error
