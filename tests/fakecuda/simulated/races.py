"""Data races between CUDA streams, found by torch's own stream sanitizer (`torch.cuda._sanitizer`).

It keeps vector clocks of streams and events, and reports two accesses to the same memory, neither of them ordered
behind the other. Here it works by storage, since views of one buffer have many addresses, and in every thread. It
also reports memory that is freed while another stream may still use it. It runs on a real GPU too.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.cuda._sanitizer as sanitizer
from torch.cuda import _gpu_trace as gpu_trace
from torch.cuda._sanitizer import Access, ArgumentHandler, EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

from simulated import runtime
from simulated.threads import in_every_thread

_CALLBACKS = (
    "event_creation event_deletion event_record event_wait memory_allocation memory_deallocation stream_creation "
    "device_synchronization stream_synchronization event_synchronization"
).split()
_SITES = 3
"""Lines of flexgen that stand for an access."""


@dataclass(frozen=True)
class Hazard:
    """Two accesses that nothing orders: what they do, and the lines of flexgen they come from, innermost first."""

    what: str
    now: str
    before: str


@dataclass
class Races:
    """What was found: how often each hazard occurred, and how many operations were looked at."""

    hazards: Counter[Hazard] = field(default_factory=Counter)
    operations: int = 0

    def __str__(self) -> str:
        lines = [f"{n} times {h.what}: {h.now} and {h.before}" for h, n in self.hazards.most_common(10)]
        return "\n".join([f"{self.hazards.total()} hazards in {self.operations} operations", *lines])


class _ByStorage(ArgumentHandler):
    """Tensors are known by the address of their storage."""

    def _handle_argument(
        self,
        value: Any,
        is_write: bool,
        metadata_only: bool,
        name: str | None = None,
        is_output: bool = False,
    ) -> None:
        if not (isinstance(value, torch.Tensor) and value.is_cuda):
            return
        place = value.untyped_storage().data_ptr() or id(value)
        if is_write:
            self.dataptrs_written.add(place)
        elif not metadata_only:
            self.dataptrs_read.add(place)
        self.tensor_aliases.setdefault(place, [])
        if is_output:
            self.outputs.add(place)


class _Handler(EventHandler):
    """The sanitizer's clocks, for several threads, with the stream that each allocation belongs to."""

    def __init__(self, races: Races) -> None:
        super().__init__()
        self.races = races
        self.lock = threading.RLock()
        self._homes: dict[int, int] = {}

    def _handle_memory_allocation(self, data_ptr: int) -> None:
        super()._handle_memory_allocation(data_ptr)
        self._homes[data_ptr] = torch.cuda.current_stream().cuda_stream

    def _handle_memory_deallocation(self, data_ptr: int) -> None:
        info, home = self.tensors_accessed.accesses.get(data_ptr), self._homes.get(data_ptr)
        if info is not None and home is not None:
            last = [*info.reads, *([info.write] if info.write else [])]
            for access in last:
                if access.stream != home and not self.syncs.is_ordered_after(
                    home, access.seq_num, access.stream
                ):
                    freed = _site(info.allocation_stack_trace or ())
                    self.races.hazards[Hazard("freed while in use", freed, _of(access))] += 1
        super()._handle_memory_deallocation(data_ptr)

    def kernel(self, schema: torch.FunctionSchema, arguments: ArgumentHandler) -> None:
        with self.lock:
            self._kernel(schema, arguments)

    def _kernel(self, schema: torch.FunctionSchema, arguments: ArgumentHandler) -> None:
        read = arguments.dataptrs_read - arguments.dataptrs_written
        stream = torch.cuda.current_stream().cuda_stream
        found = self._handle_kernel_launch(
            stream, read, arguments.dataptrs_written, arguments.outputs, str(schema), arguments.tensor_aliases
        )
        self.races.operations += 1
        for error in found:
            now, before = error.current_access, error.previous_access
            hazard = Hazard(f"{now.type} after {before.type}", _of(now), _of(before))
            self.races.hazards[hazard] += 1


def _of(access: Access) -> str:
    return f"{str(access.operator).partition('(')[0]} in {_site(access.stack_trace)}"


def _site(stack: Iterable[traceback.FrameSummary]) -> str:
    frames = [f for f in stack if "/flexgen/" in f.filename and not f.filename.endswith("lanes.py")]
    lines = [f"{f.filename.rpartition('/flexgen/')[2]}:{f.lineno}" for f in reversed(frames[-_SITES:])]
    return " < ".join(lines) or "no line of flexgen"


class _Watch(TorchDispatchMode):
    """Passes each operation of one thread to the handler."""

    def __init__(self, handler: _Handler) -> None:
        super().__init__()
        self._handler = handler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.record_stream.default:
            return func(*args, **kwargs)
        schema = func._schema
        factory = bool(sanitizer.FACTORY_FUNCTION_REGEX.match(schema.name))
        arguments = _ByStorage()
        arguments.parse_inputs(schema, args, kwargs, is_factory=factory)
        result = func(*args, **kwargs)
        arguments.parse_outputs(schema, result, is_factory=factory)
        if runtime.capturing():
            runtime.at_each_launch(partial(self._handler.kernel, schema, arguments))
            return result
        with self._handler.lock:
            self._handler.kernel(schema, arguments)
            if _blocks(schema.name, args, kwargs):  # torch does not always report it
                self._handler._handle_stream_synchronization(torch.cuda.current_stream().cuda_stream)
        return result


def _blocks(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the host has waited for the stream when the operation returns."""
    if name in ("aten::_to_copy", "aten::_local_scalar_dense"):
        return True
    if name != "aten::copy_" or args[0].is_cuda == args[1].is_cuda:
        return False
    return not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def _callbacks(name: str) -> list[Any]:
    registry = "".join(map(str.capitalize, name.split("_"))) + "Callbacks"
    return getattr(gpu_trace, registry).callback_list


def _forget_all() -> None:
    for name in _CALLBACKS:
        _callbacks(name).clear()


# torch registers callbacks when its module is imported. They store a stack trace for each allocation, also in tests
# that look for no races, which then take many times as long.
_forget_all()


def _call(handler: _Handler, name: str, *args: Any) -> None:
    with handler.lock:
        getattr(handler, f"_handle_{name}")(*args)


@contextlib.contextmanager
def watched() -> Iterator[Races]:
    """Look for races in all threads that begin meanwhile, and in this one."""
    assert not any(map(_callbacks, _CALLBACKS)), "one watch at a time"
    torch._C._activate_gpu_trace()
    torch.cuda.synchronize()
    races = Races()
    handler = _Handler(races)
    for name in _CALLBACKS:
        _callbacks(name).append(partial(_call, handler, name))
    try:
        with in_every_thread(lambda: _Watch(handler)):
            yield races
    finally:
        _forget_all()
