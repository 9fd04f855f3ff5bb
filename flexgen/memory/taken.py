"""What a part of a call has taken of the machine, given back together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

from flexgen.memory.disk_store import DiskStore
from flexgen.memory.store import Store


class Taken:
    """Buffers and scratch files, and whatever else is to be undone with them.

    `close` gives all of it back, the last one first, and begins anew. Where one cannot be given back, or Ctrl-C
    arrives meanwhile, the others are, and then the error comes out.
    """

    def __init__(self) -> None:
        self._back = contextlib.ExitStack()

    def buffer(self, store: Store, nbytes: int, purpose: str) -> Tensor:
        """`Store.allocate`."""
        buffer = store.allocate(nbytes, purpose)
        self._back.callback(store.release, buffer)
        return buffer

    def file(self, disk: DiskStore, name: str, nbytes: int) -> Path:
        """`DiskStore.scratch`."""
        path = disk.scratch(name, nbytes)
        self._back.callback(disk.release, path)
        return path

    def also(self, undo: Callable[[], object]) -> None:
        """Have `undo` called with the rest."""
        self._back.callback(undo)

    def close(self) -> None:
        self._back.close()


class _Closes(Protocol):
    def close(self) -> None: ...


Owner = TypeVar("Owner", bound=_Closes)
Arguments = ParamSpec("Arguments")


def whole_or_closed(
    make: Callable[Concatenate[Owner, Arguments], None],
) -> Callable[Concatenate[Owner, Arguments], None]:
    """Has an `__init__` that fails, or that Ctrl-C ends, give back what it took: nobody else could.

    `close` is called for an object that is not whole; it may rely on what `__init__` does before it takes anything.
    """

    @wraps(make)
    def made(self: Owner, *args: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            make(self, *args, **options)
        except BaseException:
            self.close()
            raise

    return made
