"""The disk tier: transfers that bypass the page cache.

Streaming weights through the page cache would copy every byte once more, on the CPU that the arithmetic needs, and
evict pages that other programs use. So files are opened with O_DIRECT, and a few threads move them in large
aligned chunks, several in flight. If a file system refuses O_DIRECT, the same calls are buffered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from flexgen.errors import CheckpointError
from flexgen.memory.direct_file import DirectFile
from flexgen.memory.open_files import OpenFiles
from flexgen.memory.threads import pool
from flexgen.memory.throttle import Throttle
from flexgen.units import BLOCK, KIB, MIB, align

DISK_THREADS = 6
"""Threads that read and write files. They mostly wait, so the number does not depend on the cores: a disk reaches its
bandwidth with a few pieces in flight."""
_HOP_BYTES = 512 * KIB  # a smaller transfer takes less time than a thread switch
_INLINE_PIECES = 4  # the calling thread moves up to 4 small pieces; several threads move more of them


@dataclass(frozen=True)
class Read:
    """Fill `target`, a 1-D uint8 view of host memory, from byte `offset` of a file.

    `target` may extend past the end of the file, so that a read can be aligned. The file must have its first `needed`
    bytes (None: all).
    """

    path: Path
    offset: int
    target: torch.Tensor
    needed: int | None = None


@dataclass(frozen=True)
class Write:
    """Write `source`, a 1-D uint8 view of host memory, at byte `offset` of an existing file."""

    path: Path
    offset: int
    source: torch.Tensor


@dataclass(frozen=True)
class ReadJob:
    """Reads as the job of a lane. A call returns when they are done; a `DiskLane` starts them early."""

    io: DiskIO
    reads: Sequence[Read]

    def __call__(self) -> None:
        self.io.read(self.reads)

    def start(self) -> Transfer | None:
        transfer = self.io.start_read(self.reads)
        if transfer.under_way:
            return transfer
        transfer.wait()
        return None


class Transfer:
    """Pieces in flight. The caller that starts a transfer must call `wait` once."""

    def __init__(
        self,
        io: DiskIO,
        files: Sequence[DirectFile],
        futures: Sequence[Future[None]],
        began: float,
        nbytes: int,
    ) -> None:
        self._io = io
        self._files = files
        self._futures = futures
        self._began = began
        self._nbytes = nbytes

    @property
    def under_way(self) -> bool:
        """Whether threads move it. The calling thread moves a few small pieces itself."""
        return bool(self._futures)

    def wait(self) -> None:
        """Block until all pieces are moved. After an error, no thread accesses the memory."""
        try:
            wait(self._futures, return_when=FIRST_EXCEPTION)
        finally:  # also on an interrupt: the caller may free the memory as soon as this returns
            self.abandon()
        for future in self._futures:
            if not future.cancelled():
                future.result()
        self._io.throttle.wait(self._began, self._nbytes)

    def abandon(self) -> None:
        """Cancel the pieces that have not begun and wait for the others."""
        for future in self._futures:
            future.cancel()
        wait(self._futures)
        self._io.files.release(self._files)


def aligned_span(offset: int, nbytes: int) -> tuple[int, int, int]:
    """(start, length, lead) of the smallest aligned span with `nbytes` at `offset`; they begin after `lead` bytes."""
    lead = offset % BLOCK
    return offset - lead, align(lead + nbytes, BLOCK), lead


class DiskIO:
    """Reads and writes many pieces in parallel, with `threads` threads and chunks of `chunk` bytes.

    Safe to call from several threads. At most `open_files` unused files stay open. `throttle` limits the bandwidth to
    that of an emulated disk.
    """

    def __init__(
        self,
        threads: int = DISK_THREADS,
        chunk: int = 8 * MIB,
        direct: bool = True,
        open_files: int = 256,
        throttle: Throttle | None = None,
    ) -> None:
        if chunk < BLOCK or chunk % BLOCK:
            raise ValueError(f"chunk is {chunk} bytes; it must be a multiple of {BLOCK}")
        self.threads = threads
        self.chunk = chunk
        self.files = OpenFiles(direct, open_files)
        self.throttle = throttle or Throttle()
        self._pool = pool(threads, "flexgen-disk")
        self._closed = False

    def read(self, reads: Sequence[Read]) -> None:
        """Fill all targets, then return.

        Raises CheckpointError if a file ends before the needed bytes, and OSError with the path for
        all other failures. After an error, no thread writes to the targets.
        """
        self._begin(_read_pieces(reads), _read_chunk, writable=False, inline=self.chunk).wait()

    def start_read(self, reads: Sequence[Read]) -> Transfer:
        """Start a `read`. Returns while the threads are busy; `wait` of the result ends the read.

        Reads in flight at the same time keep all threads busy. With one read after the other, some threads would be
        idle at the end of each. Raises the errors of `read`, here or in `wait`.
        """
        inline = min(self.chunk, _HOP_BYTES)
        return self._begin(_read_pieces(reads), _read_chunk, writable=False, inline=inline)

    def write(self, writes: Sequence[Write]) -> None:
        """Write all sources to the disk, then return. Raises OSError with the path."""
        for write in writes:
            _check(write.path, write.offset, write.source)
        pieces: list[_Piece] = [(write.path, write.offset, write.source, None) for write in writes]
        self._begin(pieces, _write_chunk, writable=True, inline=self.chunk).wait()

    def forget(self, path: Path) -> None:
        """Close `path`. Call it before the file is removed or replaced."""
        self.files.forget(path)

    def close(self) -> None:
        """Wait for the transfers in flight, end the threads and close all files."""
        self._closed = True
        self._pool.shutdown()
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, pieces: Sequence[_Piece], move: _Move, *, writable: bool, inline: int) -> Transfer:
        """Submit the pieces to the threads. A few pieces of at most `inline` bytes in total are moved immediately."""
        if self._closed:
            raise RuntimeError("this DiskIO is closed")
        began = self.throttle.clock()
        total = sum(tensor.numel() for _, _, tensor, _ in pieces)
        files: list[DirectFile] = []
        futures: list[Future[None]] = []
        transfer = Transfer(self, files, futures, began, total)
        try:
            parts: list[_Part] = []
            for path, offset, tensor, needed in pieces:
                files.append(file := self.files.acquire(path, writable))
                view = tensor.numpy().data
                needed = len(view) if needed is None else needed
                for at in range(0, len(view), self.chunk):
                    part = view[at : at + self.chunk]
                    parts.append((file, part, offset + at, min(max(needed - at, 0), len(part))))
            if total <= inline and len(parts) <= _INLINE_PIECES:
                _move_all(move, parts)
            else:
                for share in self._shares(parts):  # after an error, `abandon` must find the submitted ones
                    futures.append(self._pool.submit(_move_all, move, share))
        except BaseException:
            transfer.abandon()
            raise
        return transfer

    def _shares(self, parts: Sequence[_Part]) -> Iterator[list[_Part]]:
        """Divide the parts into shares for the threads, each of at most a chunk and at most an equal number of
        parts."""
        most = -(-len(parts) // self.threads)
        share: list[_Part] = []
        nbytes = 0
        for part in parts:
            if share and (nbytes + len(part[1]) > self.chunk or len(share) == most):
                yield share
                share, nbytes = [], 0
            share.append(part)
            nbytes += len(part[1])
        if share:
            yield share


_Piece = tuple[Path, int, torch.Tensor, int | None]
_Part = tuple[DirectFile, memoryview, int, int]
_Move = Callable[[DirectFile, memoryview, int, int], None]


def _read_pieces(reads: Sequence[Read]) -> list[_Piece]:
    for read in reads:
        _check(read.path, read.offset, read.target)
        length = read.target.numel()
        if read.needed is not None and not 0 <= read.needed <= length:
            raise ValueError(f"{read.path}: needs {read.needed} bytes of a read of {length}")
    return [(read.path, read.offset, read.target, read.needed) for read in reads]


def _move_all(move: _Move, parts: Iterable[_Part]) -> None:
    for part in parts:
        move(*part)


def _read_chunk(file: DirectFile, view: memoryview, offset: int, needed: int) -> None:
    got = file.read(view, offset)
    if got < needed:
        raise CheckpointError(
            f"{file.path}: needs {needed} bytes at offset {offset}, got {got}: the file ends at "
            f"{file.size}; it was truncated or changed, download or write it again"
        )


def _write_chunk(file: DirectFile, view: memoryview, offset: int, needed: int) -> None:
    file.write(view, offset)


def _check(path: Path, offset: int, memory: torch.Tensor) -> None:
    flat = memory.dim() == 1 and memory.is_contiguous()
    if not flat or memory.dtype != torch.uint8 or memory.device.type != "cpu":
        raise ValueError(
            f"{path}: a transfer needs contiguous 1-D uint8 host memory, not "
            f"{memory.dtype} {tuple(memory.shape)} on {memory.device}"
        )
    for name, value in (("offset", offset), ("length", memory.numel()), ("address", memory.data_ptr())):
        if value % BLOCK or value < 0:
            raise ValueError(f"{path}: {name} {value} must be a multiple of {BLOCK}; see aligned_span")
