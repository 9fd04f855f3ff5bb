"""Errors that torch raises for a GPU, as classes of `flexgen.errors`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from types import FrameType

import torch

from flexgen.errors import CapacityError, DeviceError, FlexGenError, LaneError, StepCapacityError

_DEVICE_IS_FULL = "out of memory", "ALLOC_FAILED"  # messages of CUDA and cuBLAS
_HOST_IS_FULL = "DefaultCPUAllocator"
_OF_THE_DEVICE = "CUDA error", "CUDA driver error", "HIP error", "CUBLAS_STATUS", "CUDNN_STATUS"


def named(error: BaseException) -> BaseException:
    """The flexgen error for an error of torch, which becomes its `__cause__`. Returns other errors unchanged."""
    if isinstance(error, FlexGenError) or not isinstance(error, RuntimeError):
        return error
    message = str(error)
    found: FlexGenError
    if _HOST_IS_FULL in message:
        found = CapacityError(f"host memory is full ({_first_line(message)}). {_SMALLER}")
    elif not isinstance(error, torch.OutOfMemoryError) and not any(w in message for w in _OF_THE_DEVICE):
        return error
    elif any(words in message for words in _DEVICE_IS_FULL):
        found = CapacityError(f"the GPU's memory is full ({short_of_memory(error)}). {_SMALLER}")
    else:
        found = DeviceError(
            f"the GPU has failed ({_first_line(message)}). The error lasts until the process ends, and a step before "
            "the reported one may have caused it: start a new process, with CUDA_LAUNCH_BLOCKING=1 to find the step"
        )
    found.__cause__ = error
    return found


_SMALLER = "Use smaller batches or shorter prompts, or end other programs that use this memory"


def short_of_memory(error: BaseException) -> str:
    """The part of torch's message about a failed allocation with the requested and the free memory."""
    return ". ".join(_first_line(str(error)).split(". ")[:3])


def _first_line(message: str) -> str:
    return message.partition("\n")[0].strip().rstrip(".")


def lane_error(what: str, cause: BaseException) -> LaneError:
    """The error for `what` ("... failed"), of the class for its cause, which becomes its `__cause__`."""
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
    """A context in which torch's errors are raised as flexgen's.

    After an out-of-memory error, it clears the frames that have ended. They refer to buffers of the failed call,
    which would otherwise stay allocated as long as the caller keeps the error.
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
            with contextlib.suppress(RuntimeError):  # the frame still runs, and so do all its callers
                while frame is not None:  # a frame refers to its callers, which may have caught the error
                    frame.clear()
                    frame = frame.f_back
        error = error.__cause__
