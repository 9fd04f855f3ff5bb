"""What is known about a file of answers: the job that it belongs to, how that is run, digests of what was saved."""

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
    """What a save left: how many answers, in how many bytes, and the SHA-256 of all these bytes, in hex."""

    answers: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class JobState:
    """`about` is what the answers depend on and `run` how they are made, plain data by name both; `marks` grow."""

    about: Mapping[str, Any]
    run: Mapping[str, Any]
    marks: tuple[Mark, ...] = ()

    def up_to(self, answers: int) -> Self:
        """The job as it was when so many answers were saved."""
        return replace(self, marks=tuple(mark for mark in self.marks if mark.answers <= answers))


class JobFile:
    """Lines of JSON: one with `about` and `run`, then one for each mark.

    A mark is appended with each save. One that a crash tore is left out, as if its save had not been.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self._mode = mode
        self._fd: int | None = None

    def read(self) -> JobState | None:
        """The job, None if there is no file. Raises RequestError for a file that is damaged or of another kind."""
        if not self.path.exists():
            return None
        if not self.path.is_file():
            raise RequestError(f"{self.path} is not a regular file; name another output")
        *lines, _ = self.path.read_bytes().split(b"\n")
        try:
            if not lines:
                raise ValueError("it has no whole line")
            head, *marks = [json.loads(line) for line in lines]
            return JobState(_mapping(head, "about"), _mapping(head, "run"), _marks(marks))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            answers = self.path.name.removesuffix(self.path.suffix)
            raise RequestError(
                f"{self.path} is damaged, or of another version ({reason}). Name another output, or remove it and "
                f"{answers} to begin again"
            ) from None

    def write(self, job: JobState) -> None:
        """Replace the file with one that holds `job`; later marks are appended to it."""
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
        """Append a mark; it is on the disk when this returns. Raises OSError, and then the file is as before."""
        assert self._fd is not None, "write comes first"
        append(self._fd, (json.dumps(asdict(mark)) + "\n").encode())

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def create(path: Path, mode: int) -> int:
    """A descriptor of the file, to read and write. A file that did not exist gets `mode`, whatever the umask is."""
    new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    if new:
        with contextlib.suppress(OSError):  # some file systems have no modes
            os.fchmod(fd, mode)
    return fd


def append(fd: int, data: bytes) -> None:
    """Append to a file; the data is on the disk when this returns. Raises OSError, and then the file is as before."""
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
    """Make the names in a folder survive a power failure, on file systems that can."""
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
