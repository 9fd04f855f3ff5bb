"""Files that can be read: not a link to nothing, a FIFO, or a pointer to the file itself."""

from __future__ import annotations

import stat
from pathlib import Path

from flexgen.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"


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
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise CheckpointError(f"{path} is {kind}; expected a regular file")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in {path.parent}, or download "
                "the file from the hub"
            )
