"""Samples of weight files, to distinguish their contents without reading all bytes."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

_BLOCK = 4096


def sample(path: Path, offset: int, nbytes: int) -> bytes:
    """The first, middle and last 4 KiB of a tensor's bytes, or all bytes of a small tensor.

    Training changes nearly every value of a tensor, so it also changes the sample.
    """
    with path.open("rb", buffering=0) as file:
        if nbytes <= 3 * _BLOCK:
            file.seek(offset)
            return file.read(nbytes)
        found = []
        for begin in (0, (nbytes - _BLOCK) // 2, nbytes - _BLOCK):
            file.seek(offset + begin)
            found.append(file.read(_BLOCK))
        return b"".join(found)


def archive_content(path: Path) -> str:
    """Names, sizes and CRC-32 of a zip file's members, from its directory; for other files, a digest of all bytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.save names the folder in the archive after the file.
            members = [
                (info.filename.partition("/")[2], info.file_size, info.CRC) for info in archive.infolist()
            ]
        return repr(sorted(members))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
