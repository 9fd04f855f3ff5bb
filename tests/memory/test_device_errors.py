"""Errors of torch under the names that flexgen gives them."""

import weakref

import pytest
import torch

from flexgen.errors import CapacityError, DeviceError, LaneError, RequestError, StepCapacityError
from flexgen.memory.device_errors import lane_error, named, named_errors

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. Of the allocated memory ..."
HOST_FULL = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ..."


@pytest.mark.parametrize(
    ("error", "kind", "of_a_step"),
    [
        (torch.OutOfMemoryError(FULL), CapacityError, StepCapacityError),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors ..."),
            CapacityError,
            StepCapacityError,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            CapacityError,
            StepCapacityError,
        ),
        (RuntimeError(HOST_FULL), CapacityError, StepCapacityError),
        (RuntimeError("CUDA error: device-side assert triggered\nCompile with"), DeviceError, DeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when"), DeviceError, DeviceError),
        (RuntimeError("HIP error: unspecified launch failure"), DeviceError, DeviceError),
    ],
)
def test_errors_of_torch_have_names(error, kind, of_a_step):
    with pytest.raises(kind) as caught, named_errors():
        raise error
    assert caught.value.__cause__ is error
    message = str(caught.value)
    assert (
        str(error).split(".")[0].split("\n")[0] in message
        and "might be" not in message
        and "Of the allocated" not in message
    )
    assert named(caught.value) is caught.value
    of_step = lane_error("compute of token 3 failed", error)
    assert type(of_step) is of_a_step and isinstance(of_step, LaneError)
    assert str(of_step).startswith("compute of token 3 failed: ") and of_step.__cause__.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("odd"), RequestError("too long")]
)
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)) as caught, named_errors():
        raise error
    assert caught.value is error and named(error) is error
    of_step = lane_error("compute of token 3 failed", error)
    assert type(of_step) is LaneError and of_step.__cause__ is error


def test_an_error_for_want_of_memory_holds_none():
    def caught_inside(buffer):
        error = CapacityError("full")
        try:
            raise error
        except CapacityError:
            return error

    def call():
        buffer = torch.zeros(1)
        alive.append(weakref.ref(buffer))
        raise caught_inside(buffer)

    alive = []
    with pytest.raises(CapacityError) as caught, named_errors():
        call()
    assert caught.value and alive[0]() is None
