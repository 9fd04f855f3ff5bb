"""Resources that one part of a call has taken, released together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

from flexgen.memory.disk_store import DiskStore
from flexgen.memory.store import Store

_ATTEMPTS = 3
"""Of giving one thing back while Ctrl-C is pressed."""


def run_all(steps: list[Callable[[], object]]) -> None:
    """Call and remove every step, the last one first, whatever another one raises; then raise the first error.

    A step that a signal interrupts is called again, so each must do nothing where its work is done. What is still
    in the list after a second interrupt is run by the next call.
    """
    raised: BaseException | None = None
    attempts = 0
    while steps:
        try:
            attempts += 1
            steps[-1]()
            steps.pop()
            attempts = 0
        except BaseException as error:
            raised = raised or error
            if steps and (isinstance(error, Exception) or attempts >= _ATTEMPTS):
                steps.pop()
                attempts = 0
    if raised is not None:
        raise raised


class Taken:
    """Buffers and scratch files, and whatever else is to be undone with them.

    `close` gives all of it back, the last one first, and leaves an empty object. Where one cannot be given back, or
    Ctrl-C arrives meanwhile, the others are, and then the error is raised. How each thing is given back is noted
    before it is taken, so an interrupt between the two loses nothing.
    """

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []

    def buffer(self, store: Store, nbytes: int, purpose: str, copied_by_device: bool = True) -> Tensor:
        """`Store.allocate`."""
        held: list[Tensor] = []
        self._back.append(partial(_release, store, held))
        return store.allocate(nbytes, purpose, held.append, copied_by_device)

    def file(self, disk: DiskStore, name: str, nbytes: int) -> Path:
        """`DiskStore.scratch`."""
        path = disk.scratch_path(name)
        self._back.append(partial(disk.release, path))
        return disk.make(path, nbytes)

    def also(self, undo: Callable[[], object]) -> None:
        """Have `undo` called with the rest; it must do nothing when it is called again."""
        self._back.append(undo)

    def close(self) -> None:
        run_all(self._back)

    def __del__(self) -> None:
        # Ctrl-C can arrive when an owner is whole and its maker has not stored it yet: then nobody calls `close`.
        self.close()


def _release(store: Store, held: list[Tensor]) -> None:
    for buffer in held:
        store.release(buffer)


class _Closes(Protocol):
    def close(self) -> None: ...


Owner = TypeVar("Owner", bound=_Closes)
Arguments = ParamSpec("Arguments")


def whole_or_closed(
    make: Callable[Concatenate[Owner, Arguments], None],
) -> Callable[Concatenate[Owner, Arguments], None]:
    """Has an `__init__` that fails, or that Ctrl-C ends, give back what it took: nobody else could.

    `close` is called for an object that is not whole, once it has a `Taken` as `_taken`; it may rely on what
    `__init__` does before that.
    """

    @wraps(make)
    def made(self: Owner, *args: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            make(self, *args, **options)
        except BaseException:
            if hasattr(self, "_taken"):  # before that nothing was taken
                self.close()
            raise

    return made
