"""The output file of a batch job: append-only and crash-safe, so that an interrupted job can resume from it."""

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
    """A file with one line of JSON for each prompt, in order: its fields and `completion`. `save` appends lines.

    about: everything that the answers depend on, as plain data by name.
    prompts: the fields of each prompt.
    mode: the permissions of new files.

    `<path>.job` stores `about`, `run` (how the job runs) and a digest of the answers after each save. Only one
    process at a time can open the file. When a job resumes, partial output after the last save is removed.

    Raises RequestError if the file belongs to another job, is open in another process, was edited, or is not a
    regular file. No file is changed in that case.
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
            raise RequestError(f"{path} is not a regular file; choose another output file")
        self._made = not self.path.exists()
        self._fd = create(self.path, mode)
        try:
            self._lock()
            self._job = self._read_job()
            self._saved, self._digest = self._intact()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def run(self) -> Mapping[str, Any] | None:
        """How the job has run so far, as plain data; None for a new job."""
        return None if self._job is None else self._job.run

    @property
    def job_path(self) -> Path:
        """The file that stores `run`."""
        return self._job_file.path

    @property
    def count(self) -> int:
        """The number of saved answers."""
        return self._saved.answers

    @property
    def complete(self) -> bool:
        """Whether every prompt has an answer."""
        return self.count == self.total

    def begin(self, run: Mapping[str, Any]) -> None:
        """Record how the job runs from now on, as plain data, and remove partial output after the last save."""
        before = JobState(self._about, run) if self._job is None else self._job
        self._job = JobState(self._about, dict(run), before.up_to(self.count).marks)
        os.ftruncate(self._fd, self._saved.nbytes)
        self._job_file.write(self._job)

    def save(self, completions: Sequence[str]) -> None:
        """Append the next answers; they are on disk when this returns.

        Raises OSError, with the number of saved answers, if they cannot be written.
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
                f"{self.path}: cannot write answers: {error.strerror}. {self.count} of {self.total} answers are "
                "saved; free some space, then run the same command again to resume"
            ) from error
        self._saved, self._digest = mark, digest

    def close(self) -> None:
        """Release the file. If no job was begun in it, remove it."""
        if self._made and self._job is None:
            self.path.unlink(missing_ok=True)
        self._job_file.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Lock the file until the process ends. Some file systems have no locks."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{self.path} is in use by another process; wait for it to end, or choose another output file"
            ) from None
        except OSError:
            return
        here = os.stat(self.path) if self.path.exists() else None
        if here is None or not os.path.samestat(here, os.fstat(self._fd)):
            raise RequestError(f"{self.path} was removed while it was being opened; run the command again")

    def _read_job(self) -> JobState | None:
        name = self._job_file.path.name
        job = self._job_file.read()
        if job is None:
            if os.fstat(self._fd).st_size == 0:
                return None
            raise RequestError(
                f"{self.path} exists, but {name}, which records its job, does not; choose another output file"
            )
        names = [*job.about, *(name for name in self._about if name not in job.about)]
        if changed := [name for name in names if job.about.get(name) != self._about.get(name)]:
            raise RequestError(
                f"{self.path} was begun with a different value of: {', '.join(changed)}. Choose another output file, "
                f"or remove it and {name} to start over"
            )
        if job.marks and job.marks[-1].answers > self.total:
            raise RequestError(
                f"{self._job_file.path} is damaged: it counts {job.marks[-1].answers} answers for {self.total} "
                f"prompts. Choose another output file, or remove it and {self.path.name} to start over"
            )
        return job

    def _intact(self) -> tuple[Mark, Any]:
        """The last save whose answers are unchanged, and the digest up to it.

        The file may be shorter than a later save: it was truncated, and the missing answers are generated again. It
        may have whole or partial lines after the last mark: the process crashed before it wrote the mark. Any other
        difference is an edit.
        """
        size = os.fstat(self._fd).st_size
        digest = hashlib.sha256()
        intact = Mark(0, 0, digest.hexdigest())
        for mark in () if self._job is None else self._job.marks:
            if size < mark.nbytes:
                break
            read = digest.copy()
            for chunk in self._chunks(intact.nbytes, mark.nbytes):
                read.update(chunk)
            if read.hexdigest() != mark.sha256:
                self._check_lines(intact, size)
                self._refuse(
                    f"one of the lines {intact.answers + 1} to {mark.answers} was edited", intact.answers
                )
            intact, digest = mark, read
        self._check_lines(intact, size)
        return intact, digest

    def _check_lines(self, intact: Mark, size: int) -> None:
        """Raise RequestError unless each line after `intact` begins with the fields of its prompt.

        The last line may be incomplete."""
        row = intact.answers
        for line in self._lines(intact.nbytes, size):
            if row == self.total:
                self._refuse(f"line {row + 1} is text after the answers of all {row} prompts", row)
            whole = line.endswith(b"\n")
            if not whole:
                line = line.rstrip(b"\0")  # a power failure can leave a length without the data
            expected = _line({**self._prompts[row], COMPLETION: ""})[: -len('"}\n')]
            if not line.startswith(expected if whole else expected[: len(line)]):
                self._refuse(f"line {row + 1} is not the answer of its prompt", row)
            row += 1

    def _refuse(self, what: str, good: int) -> NoReturn:
        raise RequestError(
            f"{self.path} was edited: {what}. Restore the file, choose another output file, or keep only its first "
            f"{good} lines: the same command then answers the other prompts again"
        )

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        while begin < end and (chunk := os.pread(self._fd, min(_CHUNK, end - begin), begin)):
            yield chunk
            begin += len(chunk)

    def _lines(self, begin: int, end: int) -> Iterator[bytes]:
        """Lines with their line ends; the last line may lack one."""
        rest = b""
        for chunk in self._chunks(begin, end):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in whole)
        if rest:
            yield rest


def _line(answer: Mapping[str, Any]) -> bytes:
    return (json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n").encode()
