"""Weights that a CPU uses in the page cache: parts of files that are mapped, not copied.

A copy takes its bytes a second time, and the first use of new memory takes longer than the copy itself, in a virtual
machine several times as long. In return, products are a few percent slower, because the page cache has small pages.
And the files of an open model must not be changed in place: a process that reads a mapped page after the end of a
file gets SIGBUS. Replacing or removing a file is safe.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexgen.errors import CheckpointError
from flexgen.models.checkpoint import Extent
from flexgen.models.plain_files import reading
from flexgen.units import MIB

LEAST_BYTES = 1 * MIB
"""The minimum bytes of weights in a file that is mapped. Fewer bytes are copied faster than mapped."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of madvise(2), since Linux 5.14: map pages, and read them if necessary. Errors are returned, not
raised as signals."""
_AT_ONCE = 16 * MIB
"""Bytes that a thread maps at once."""


def map_extents(extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """The bytes of each extent (uint8), by key, as a private mapping of its file: writes do not reach the file.

    Each file is mapped once, from its first to its last extent. A file with too few bytes is left out, and so is one
    that the system cannot map. Raises CheckpointError if a file cannot be opened or is too short.
    """
    by_file: dict[Path, dict[str, Extent]] = {}
    for key, extent in extents.items():
        by_file.setdefault(extent.path, {})[key] = extent
    found = {}
    for path, own in by_file.items():
        if sum(extent.nbytes for extent in own.values()) < LEAST_BYTES:
            continue
        begin = min(extent.offset for extent in own.values()) // mmap.PAGESIZE * mmap.PAGESIZE
        end = max(extent.offset + extent.nbytes for extent in own.values())
        mapped = _map(path, begin, end)
        if mapped is not None:
            for key, extent in own.items():
                found[key] = mapped[extent.offset - begin :][: extent.nbytes]
    return found


def _map(path: Path, begin: int, end: int) -> Tensor | None:
    with reading(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < end:
            raise CheckpointError(
                f"{path}: the file ends before byte {end}: it has changed since it was opened. Open the model again"
            )
        try:
            mapping = mmap.mmap(
                file.fileno(),
                end - begin,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,  # torch warns of memory that is not writable
                offset=begin,
            )
        except (OSError, ValueError):  # no mappings of this file system, or too many of them
            return None
    return torch.frombuffer(mapping, dtype=torch.uint8)


def prefaults(mapped: Tensor, path: Path) -> Iterator[Callable[[], None]]:
    """Tasks that read the pages of `mapped` (uint8), from `path`, and map them for this process.

    A task raises CheckpointError if the file cannot be read.
    """
    first, end = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, mapped.data_ptr() + mapped.nbytes
    for begin in range(first, end, _AT_ONCE):
        yield partial(_prefault, mapped, begin, min(begin + _AT_ONCE, end), path)


def _prefault(owner: Tensor, begin: int, end: int, path: Path) -> None:
    """owner: the tensor whose memory it is, so that the mapping stays during the call."""
    # Python's own madvise keeps the lock of the interpreter, so that threads would take turns.
    if _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _POPULATE_READ) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EFAULT, errno.EIO):
        raise CheckpointError(
            f"{path}: cannot be read: the disk reports an error, or the file is shorter than before. Copy or "
            "download it again"
        )
    # An older kernel maps each page when it is used.


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
