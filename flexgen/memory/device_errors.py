"""Errors that torch raises for a GPU, as classes of `flexgen.errors`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from types import FrameType

import torch

from flexgen.errors import CapacityError, DeviceError, FlexGenError, LaneError, StepCapacityError

_DEVICE_IS_FULL = "out of memory", "ALLOC_FAILED"  # CUDA's and cuBLAS's words
_HOST_IS_FULL = "DefaultCPUAllocator"
_OF_THE_DEVICE = "CUDA error", "CUDA driver error", "HIP error", "CUBLAS_STATUS", "CUDNN_STATUS"


def named(error: BaseException) -> BaseException:
    """The flexgen error that stands for an error of torch, which is its `__cause__`; any other error as it is."""
    if isinstance(error, FlexGenError) or not isinstance(error, RuntimeError):
        return error
    told = str(error)
    found: FlexGenError
    if _HOST_IS_FULL in told:
        found = CapacityError(f"host memory is full ({_first_line(told)}). {_SMALLER}")
    elif not isinstance(error, torch.OutOfMemoryError) and not any(w in told for w in _OF_THE_DEVICE):
        return error
    elif any(words in told for words in _DEVICE_IS_FULL):
        found = CapacityError(f"the GPU's memory is full ({short_of_memory(error)}). {_SMALLER}")
    else:
        found = DeviceError(
            f"the GPU has failed ({_first_line(told)}). Such an error stays until the process ends, and may come "
            "from an earlier step than the one that reports it: start a new process, with CUDA_LAUNCH_BLOCKING=1 to "
            "find the step"
        )
    found.__cause__ = error
    return found


_SMALLER = "Use smaller batches or shorter prompts, or end other programs that take this memory"


def short_of_memory(error: BaseException) -> str:
    """What torch says of memory that it did not get: how much was asked for, and how much is there."""
    return ". ".join(_first_line(str(error)).split(". ")[:3])


def _first_line(told: str) -> str:
    return told.partition("\n")[0].strip().rstrip(".")


def lane_error(what: str, cause: BaseException) -> LaneError:
    """The error for `what` ("... failed"): of the class that fits its cause, which becomes its `__cause__`."""
    cause = named(cause)
    kind = LaneError
    if isinstance(cause, DeviceError):
        kind = DeviceError
    elif isinstance(cause, CapacityError):
        kind = StepCapacityError
    error = kind(f"{what}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Within it, errors of torch are raised as flexgen's.

    Where memory ran out, the frames that have ended are cleared: they hold buffers of the call that failed, which
    would otherwise stay for as long as the caller keeps the error, and be missing in the next call.
    """
    try:
        yield
    except Exception as error:
        found = named(error)
        if isinstance(found, CapacityError):
            _clear_frames(found)
        if found is error:
            raise
        raise found from error


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        for raised_in, _ in traceback.walk_tb(error.__traceback__):
            frame: FrameType | None = raised_in
            with contextlib.suppress(RuntimeError):  # of a frame that still runs, as do all that called it
                while frame is not None:  # a frame keeps its callers, whose callers may have caught the error
                    frame.clear()
                    frame = frame.f_back
        error = error.__cause__
