"""A file of answers that grows while a long job runs, from which the job continues however its process ended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from flexgen.cli.job_file import JobFile, JobState, Mark, append, create
from flexgen.cli.prompts import COMPLETION
from flexgen.errors import RequestError

_CHUNK = 1 << 20


class Answers:
    """One line of JSON for each prompt, in order: its fields and `completion`. `save` appends some of them at a time.

    about: plain data by name, whatever the answers depend on. prompts: the fields of each. mode: permissions of the
    files, where they do not exist yet.

    `<path>.job` keeps `about`, `run` (how the job is run), and a digest of the answers after each save. One process
    at a time opens the file. What a crash left after the last save is removed when the job continues.

    Raises RequestError where the file belongs to another job or to a process that runs, was edited, or is not a
    regular file; nothing is changed then.
    """

    def __init__(
        self,
        path: str | Path,
        about: Mapping[str, Any],
        prompts: Sequence[Mapping[str, Any]],
        mode: int = 0o600,
    ) -> None:
        self.path = Path(path)
        self.total = len(prompts)
        self._prompts = prompts
        self._about = dict(about)
        self._job_file = JobFile(self.path.with_name(self.path.name + ".job"), mode)
        if self.path.exists() and not self.path.is_file():
            raise RequestError(f"{path} is not a regular file; name another output")
        self._made = not self.path.exists()
        self._fd = create(self.path, mode)
        try:
            self._lock()
            self._job = self._read_job()
            self._saved, self._digest = self._kept()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def run(self) -> Mapping[str, Any] | None:
        """How the job was run until now, plain data; None for a new one."""
        return None if self._job is None else self._job.run

    @property
    def job_path(self) -> Path:
        """The file that keeps `run`."""
        return self._job_file.path

    @property
    def count(self) -> int:
        """How many answers are saved."""
        return self._saved.answers

    @property
    def complete(self) -> bool:
        """Whether every prompt has its answer."""
        return self.count == self.total

    def begin(self, run: Mapping[str, Any]) -> None:
        """Note how the job runs from here on, plain data; what follows the last save is removed."""
        before = JobState(self._about, run) if self._job is None else self._job
        self._job = JobState(self._about, dict(run), before.up_to(self.count).marks)
        os.ftruncate(self._fd, self._saved.nbytes)
        self._job_file.write(self._job)

    def save(self, completions: Sequence[str]) -> None:
        """Append the next answers; they are on the disk when this returns.

        Raises OSError, with what is kept, where they cannot be written.
        """
        prompts = self._prompts[self.count : self.count + len(completions)]
        lines = b"".join(
            _line({**fields, COMPLETION: text}) for fields, text in zip(prompts, completions, strict=True)
        )
        digest = self._digest.copy()
        digest.update(lines)
        mark = Mark(self.count + len(completions), self._saved.nbytes + len(lines), digest.hexdigest())
        try:
            append(self._fd, lines)
            try:
                self._job_file.add(mark)
            except OSError:
                os.ftruncate(self._fd, self._saved.nbytes)
                raise
        except OSError as error:
            raise OSError(
                f"{self.path}: answers cannot be written: {error.strerror}. {self.count} of {self.total} are kept: "
                "make room, and give the same command again"
            ) from error
        self._saved, self._digest = mark, digest

    def close(self) -> None:
        """Let others open it. A file that nothing was begun in is removed."""
        if self._made and self._job is None:
            self.path.unlink(missing_ok=True)
        self._job_file.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _lock(self) -> None:
        """The lock ends with the process. Some file systems have none."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{self.path} is being written by another process; wait for it, or name another output"
            ) from None
        except OSError:
            return
        here = os.stat(self.path) if self.path.exists() else None
        if here is None or not os.path.samestat(here, os.fstat(self._fd)):
            raise RequestError(f"{self.path} was removed while it was opened; give the command again")

    def _read_job(self) -> JobState | None:
        name = self._job_file.path.name
        job = self._job_file.read()
        if job is None:
            if os.fstat(self._fd).st_size == 0:
                return None
            raise RequestError(
                f"{self.path} exists, and {name}, which says what its answers belong to, does not; "
                "name another output"
            )
        names = [*job.about, *(name for name in self._about if name not in job.about)]
        if changed := [name for name in names if job.about.get(name) != self._about.get(name)]:
            raise RequestError(
                f"{self.path} was begun with other {', '.join(changed)}. Name another output, or remove it and "
                f"{name} to begin again"
            )
        if job.marks and job.marks[-1].answers > self.total:
            raise RequestError(
                f"{self._job_file.path} is damaged: it counts {job.marks[-1].answers} answers for {self.total} "
                f"prompts. Name another output, or remove it and {self.path.name} to begin again"
            )
        return job

    def _kept(self) -> tuple[Mark, Any]:
        """The last save that is still as it was written, and the digest up to it.

        The file may end before later saves: someone cut it, and what is missing is made again. It may have more
        lines, or a part of one, than the last mark counts: a crash came between the two. Anything else was edited.
        """
        size = os.fstat(self._fd).st_size
        digest = hashlib.sha256()
        kept = Mark(0, 0, digest.hexdigest())
        for mark in () if self._job is None else self._job.marks:
            if size < mark.nbytes:
                break
            read = digest.copy()
            for chunk in self._chunks(kept.nbytes, mark.nbytes):
                read.update(chunk)
            if read.hexdigest() != mark.sha256:
                self._check_lines(kept, size)
                self._refuse(
                    f"one of the lines {kept.answers + 1} to {mark.answers} was edited", kept.answers
                )
            kept, digest = mark, read
        self._check_lines(kept, size)
        return kept, digest

    def _check_lines(self, kept: Mark, size: int) -> None:
        """Raise RequestError unless each line after `kept` begins as the answer of its prompt does; the last may be
        torn."""
        row = kept.answers
        for line in self._lines(kept.nbytes, size):
            if row == self.total:
                self._refuse(f"line {row + 1} is text after the answers of all {row} prompts", row)
            whole = line.endswith(b"\n")
            if not whole:
                line = line.rstrip(b"\0")  # where a power failure left a length without the data
            expected = _line({**self._prompts[row], COMPLETION: ""})[: -len('"}\n')]
            if not line.startswith(expected if whole else expected[: len(line)]):
                self._refuse(f"line {row + 1} is not the answer of its prompt", row)
            row += 1

    def _refuse(self, what: str, good: int) -> NoReturn:
        raise RequestError(
            f"{self.path} was changed after it was written: {what}. Bring back the file as it was, name another "
            f"output, or keep the first {good} lines only: the same command then answers the other prompts again"
        )

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        while begin < end and (chunk := os.pread(self._fd, min(_CHUNK, end - begin), begin)):
            yield chunk
            begin += len(chunk)

    def _lines(self, begin: int, end: int) -> Iterator[bytes]:
        """With their ends, which the last may lack."""
        rest = b""
        for chunk in self._chunks(begin, end):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in whole)
        if rest:
            yield rest


def _line(answer: Mapping[str, Any]) -> bytes:
    return (json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n").encode()
