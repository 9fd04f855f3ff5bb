"""The user's cache: files that save time. They may be deleted at any time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder of cached files of a kind. It may not exist yet."""
    given = os.environ.get("XDG_CACHE_HOME")
    # The XDG standard says that a relative path must be ignored.
    base = Path(given) if given and os.path.isabs(given) else Path.home() / ".cache"
    return base / "flexgen" / kind


def keep(path: Path, data: bytes) -> None:
    """Write a file atomically, and its folder if necessary. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, partial = tempfile.mkstemp(prefix="part-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
