"""The state of a batch job: what its answers depend on, how it runs, and digests of the saved answers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from flexgen.errors import RequestError


@dataclass(frozen=True)
class Mark:
    """The state after a save: the number of answers, their bytes, and the SHA-256 of these bytes in hex."""

    answers: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class JobState:
    """The contents of a job file.

    about: everything that the answers depend on, as plain data by name. run: how they are generated, as plain data by
    name. marks: one for each save.
    """

    about: Mapping[str, Any]
    run: Mapping[str, Any]
    marks: tuple[Mark, ...] = ()

    def up_to(self, answers: int) -> Self:
        """The job as it was when `answers` answers were saved."""
        return replace(self, marks=tuple(mark for mark in self.marks if mark.answers <= answers))


class JobFile:
    """A file with lines of JSON: one with `about` and `run`, then one for each mark.

    Each save appends a mark. An incomplete mark, left by a crash, is ignored together with its save.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self._mode = mode
        self._fd: int | None = None

    def read(self) -> JobState | None:
        """The job, or None if there is no file. Raises RequestError if the file is damaged or not a regular file."""
        if not self.path.exists():
            return None
        if not self.path.is_file():
            raise RequestError(f"{self.path} is not a regular file; choose another output file")
        *lines, _ = self.path.read_bytes().split(b"\n")
        try:
            if not lines:
                raise ValueError("it has no complete line")
            head, *marks = [json.loads(line) for line in lines]
            return JobState(_mapping(head, "about"), _mapping(head, "run"), _marks(marks))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            answers = self.path.name.removesuffix(self.path.suffix)
            raise RequestError(
                f"{self.path} is damaged or of another version ({reason}). Choose another output file, or remove it "
                f"and {answers} to start over"
            ) from None

    def write(self, job: JobState) -> None:
        """Replace the file with `job`; `add` appends later marks to it."""
        self.close()
        new = self.path.with_name(self.path.name + ".new")
        lines = [{"about": job.about, "run": job.run}, *map(asdict, job.marks)]
        new.unlink(missing_ok=True)
        fd = create(new, self._mode)
        try:
            append(fd, "".join(json.dumps(line) + "\n" for line in lines).encode())
            os.replace(new, self.path)
            _sync_folder(self.path.parent)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def add(self, mark: Mark) -> None:
        """Append a mark; it is on disk when this returns. If it raises OSError, the file is unchanged."""
        assert self._fd is not None, "call write first"
        append(self._fd, (json.dumps(asdict(mark)) + "\n").encode())

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def create(path: Path, mode: int) -> int:
    """Open the file to read and write and return its descriptor. A new file gets `mode`, regardless of the umask."""
    new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    if new:
        with contextlib.suppress(OSError):  # some file systems have no modes
            os.fchmod(fd, mode)
    return fd


def append(fd: int, data: bytes) -> None:
    """Append to a file; the data is on disk when this returns. If it raises OSError, the file is unchanged."""
    end = os.fstat(fd).st_size
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], end + written)
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, end)
        raise


def _sync_folder(path: Path) -> None:
    """Flush the names in a folder to disk, so that they survive a power failure, if the file system supports it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def _mapping(head: Any, name: str) -> dict[str, Any]:
    if not isinstance(head, dict) or not isinstance(head.get(name), dict):
        raise ValueError(f"{name!r} is not an object in its first line")
    found: dict[str, Any] = head[name]
    return found


def _marks(lines: Sequence[Any]) -> tuple[Mark, ...]:
    marks = [Mark(**line) for line in lines]
    before = Mark(0, 0, "")
    for mark in marks:
        numbers = mark.answers, mark.nbytes
        if not all(type(number) is int for number in numbers) or not isinstance(mark.sha256, str):
            raise ValueError(f"{mark} is not a count, a length and a digest")
        if mark.answers <= before.answers or mark.nbytes <= before.nbytes:
            raise ValueError(f"{mark} does not follow {before}")
        before = mark
    return tuple(marks)
