"""A file of answers that grows while a long job runs, from which the job goes on however its process ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from flexgen.errors import RequestError


class Answers:
    """One line of JSON for each of `total` prompts, in their order. `save` appends some of them at a time.

    about: plain data by name, whatever the answers depend on. Beside the answers, `<path>.job` keeps it, with `run`:
    how the job is run. It is opened by one process at a time. What the last save did not end is cut off, so that an
    answer is never there in part, or twice.

    Raises RequestError where the file belongs to another job, to a process that lives, or is no plain file.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any], total: int) -> None:
        self.path = Path(path)
        self.total = total
        self._about = dict(about)
        self._state_path = self.path.with_name(self.path.name + ".job")
        if self.path.exists() and not self.path.is_file():
            raise RequestError(f"{path} is no plain file, which answers are kept in; name another output")
        self._made = not self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._state: dict[str, Any] | None = self._read_state()
            self.count = self._whole_lines()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def run(self) -> dict[str, Any] | None:
        """How the job was run up to here, plain data; None for one that is new."""
        return None if self._state is None else self._state["run"]

    @property
    def complete(self) -> bool:
        """Whether every prompt has its answer."""
        return self.count == self.total

    def begin(self, run: Mapping[str, Any], save_every: int) -> None:
        """Note how the job runs from here on: plain data, and how many answers are saved together.

        A save begins at `first`, or a multiple of `save_every` after it: so a prompt meets the same ones in its
        save wherever a job was cut off.
        """
        same = (
            self._state is not None and self._state["run"] == run and self._state["save_every"] == save_every
        )
        if same:
            return
        self._state = {"about": self._about, "run": dict(run), "save_every": save_every, "first": self.count}
        new = self._state_path.with_name(self._state_path.name + ".new")
        with open(new, "w", encoding="utf-8") as file:
            json.dump(self._state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._state_path)

    def save(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Append the next answers; they are on the disk when this returns.

        Raises OSError, with what is kept, where they cannot be written.
        """
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode()
        end = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(lines):
                written += os.pwrite(self._fd, lines[written:], end + written)
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            raise OSError(
                f"{self.path}: answers cannot be written: {error.strerror}. {self.count} of {self.total} are kept: "
                "make room, and give the same command again"
            ) from error
        self.count += len(answers)

    def close(self) -> None:
        """Let others open it. A file that nothing was begun in is removed."""
        if self._made and self._state is None:
            self.path.unlink(missing_ok=True)
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

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
            about = state["about"]
            _ = state["run"], int(state["first"]), int(state["save_every"])
        except FileNotFoundError:
            if os.fstat(self._fd).st_size == 0:
                return None
            raise RequestError(
                f"{self.path} exists, and there is no {self._state_path.name} that says what for; name another output"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{self._state_path} is damaged ({error}); name another output, or remove it and {self.path.name}"
            ) from None
        names = [*about, *(name for name in self._about if name not in about)]
        if changed := [name for name in names if about.get(name) != self._about.get(name)]:
            raise RequestError(
                f"{self.path} was begun with other {', '.join(changed)}. Name another output, or remove it and "
                f"{self._state_path.name} to begin anew"
            )
        kept: dict[str, Any] = state
        return kept

    def _whole_lines(self) -> int:
        """Count the answers, and cut off what follows the last whole save."""
        if self._state is None:
            return 0
        first, step = self._state["first"], self._state["save_every"]
        ends, begin = [0], 0
        while block := os.pread(self._fd, 1 << 20, begin):
            at = -1
            while (at := block.find(b"\n", at + 1)) >= 0:
                ends.append(begin + at + 1)
            begin += len(block)
        lines = len(ends) - 1
        if not first <= lines <= self.total:
            raise RequestError(
                f"{self.path} has {lines} lines, where {first} to {self.total} were written: it was changed. Name "
                f"another output, or remove it and {self._state_path.name} to begin anew"
            )
        kept = lines if lines == self.total else first + (lines - first) // step * step
        os.ftruncate(self._fd, ends[kept])
        return kept
