"""Resources that one part of a call owns, released together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

from flexgen.memory.disk_store import DiskStore
from flexgen.memory.store import Store

_ATTEMPTS = 3
"""The maximum number of attempts to release one resource when Ctrl-C interrupts the release."""


def run_all(steps: list[Callable[[], object]]) -> None:
    """Call and remove every step, last one first, even if another one raises; then raise the first error.

    A step that a signal interrupts is called again, so a step must do nothing if its work is already done. After a
    second interrupt, the next call runs the remaining steps.
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
    """Owns buffers, scratch files and other resources with an undo function.

    `close` releases all of them, last one first, and leaves an empty object. If a release fails or Ctrl-C interrupts
    it, `close` releases the others and then raises the error. The release of each resource is registered before the
    resource is acquired, so an interrupt between the two loses nothing.
    """

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []

    def buffer(
        self,
        store: Store,
        nbytes: int,
        purpose: str,
        copied_by_device: bool = True,
        in_use: int | None = None,
    ) -> Tensor:
        """`Store.allocate`."""
        held: list[Tensor] = []
        self._back.append(partial(_release, store, held))
        return store.allocate(nbytes, purpose, held.append, copied_by_device, in_use)

    def file(self, disk: DiskStore, name: str, nbytes: int) -> Path:
        """`DiskStore.scratch`."""
        path = disk.scratch_path(name)
        self._back.append(partial(disk.release, path))
        return disk.make(path, nbytes)

    def also(self, undo: Callable[[], object]) -> None:
        """Register `undo` to run on `close`. It must do nothing when it is called again."""
        self._back.append(undo)

    def close(self) -> None:
        run_all(self._back)

    def __del__(self) -> None:
        # Ctrl-C can arrive after an owner's `__init__`, before its caller has stored it. Then nothing calls `close`.
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
    """Make an `__init__` that fails, or that Ctrl-C interrupts, release its resources by a call of `close`.

    `close` is called for the incomplete object if `__init__` has set `_taken` to a `Taken`. It may depend only on
    attributes that `__init__` sets before that.
    """

    @wraps(make)
    def made(self: Owner, *args: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            make(self, *args, **options)
        except BaseException:
            if hasattr(self, "_taken"):  # before that, the object owns nothing
                self.close()
            raise

    return made
