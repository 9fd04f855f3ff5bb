"""Tapes: compiled calls that are recorded once and run for each token, without Python code between them.

While the weights of a layer pass through the caches, the interpreter's code and data leave them. So on a CPU, the
Python code between two products takes several times as long as usual. In a decode step of a small batch, that is a
considerable part of the time. A decode cell calls the same kernels with the same addresses for each token. Only the
number of cached tokens grows, which `replay` takes.

A recording computes nothing. So the cells of all layers are recorded one after the other, before any weights pass
through the caches, and the first pass is replayed like all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen.kernels.loading import native, native_available
from flexgen.kernels.result_memory import RESULT_MEMORY

_Result = TypeVar("_Result")
_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
    }
)


class Tape:
    """Recorded calls, and the tensors whose addresses they contain."""

    def __init__(self, calls: object, tensors: list[Tensor]) -> None:
        self.calls = calls
        self.tensors = tensors
        """The results of the calls."""


def replay(tapes: Sequence[Tape], later: int) -> list[float]:
    """Repeat the calls of the tapes, one tape after the other, for the token `later` tokens after the recorded one.

    Returns the seconds from the beginning to the end of each tape. Raises RuntimeError if the pages of the cache have
    no room for the token.
    """
    arguments = tuple(tape.calls for tape in tapes), later, torch.get_num_threads()
    if _profile is None:
        return native.replay(*arguments)
    began = time.perf_counter()
    calls = native.profile(*arguments)
    _profile.append(Profile(began, time.perf_counter(), calls))
    return [_profile[-1].end - began] * len(tapes)


class Profile(NamedTuple):
    """The times at which a `replay` began and ended (`time.perf_counter`), and the name and seconds of each call."""

    start: float
    end: float
    calls: list[tuple[str, float]]


_profile: list[Profile] | None = None


@contextmanager
def profiled() -> Iterator[list[Profile]]:
    """A list that gets the profile of each `replay` within the context. Only for benchmarks."""
    global _profile
    _profile = []
    try:
        yield _profile
    finally:
        _profile = None


def record(work: Callable[[], _Result], spare: Sequence[Tensor] = ()) -> tuple[_Result, Tape] | None:
    """The result of `work`, and a tape that computes it. The result has no values before the first `replay`.

    None if `work` uses operations of torch, or kernels that cannot be recorded. Views and new tensors are no such
    operations. `work` ends at the first of them, before it runs. It must not depend on values of tensors that its
    kernels write, and the caller keeps its inputs at their addresses. spare: tensors, of other tapes for example,
    that the tape may overwrite: `work` gets them instead of new ones of the same shape.
    """
    if not native_available():
        return None
    watch = _Watch(spare)
    native.record()
    try:
        with RESULT_MEMORY.suspended(), watch:
            result = work()
    except native.Unrecordable:
        return None
    finally:
        calls = native.end_record()
    return result, Tape(calls, watch.allocated)


class _Watch(TorchDispatchMode):
    """Keeps the tensors that torch allocates, or that are used instead. Raises `Unrecordable` for operations of torch
    that are neither allocations nor views."""

    def __init__(self, spare: Sequence[Tensor]) -> None:
        super().__init__()
        self._spare = list(spare)
        self.allocated: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler for the first operation, which takes a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        allocates = func in _ALLOCATIONS
        if not allocates and not func.is_view:
            raise native.Unrecordable(f"{func} is an operation of torch")
        result = func(*args, **(kwargs or {}))
        if allocates:
            result = self._instead_of(result)
            self.allocated.append(result)
        return result

    def _instead_of(self, new: Tensor) -> Tensor:
        """A spare tensor of the same kind, or `new` if there is none."""
        for n, spare in enumerate(self._spare):
            if (spare.shape, spare.stride(), spare.dtype) == (new.shape, new.stride(), new.dtype):
                return self._spare.pop(n)
        return new
