"""A GPU that fails, that is full, and that pins nothing: named errors, and nothing hangs."""

import subprocess
import sys

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from simulated import cases, runtime

from flexgen.errors import CapacityError, StepCapacityError
from flexgen.memory.cpu import HostStore
from flexgen.memory.cuda import CudaStore
from flexgen.models.embed import Head
from flexgen.units import GIB, KIB, MIB

PATIENCE = 90  # seconds after which a test that hangs fails instead

STICKY = """
import sys
from simulated import cases, runtime
from flexgen.errors import DeviceError, FlexGenError

def failed(call):
    try:
        call()
    except DeviceError as error:
        assert "start a new process" in str(error) and error.__cause__ is not None, error
        return error
    raise AssertionError("nothing was raised")

for changes, launches in ({}, 0), (dict(attend_on="cpu"), 500), (cases.RESIDENT, 4000):
    model = cases.open_on("cuda", cases.OPT, cases.policy(**changes))
    dropped = cases.open_on("cuda", cases.OPT, cases.policy())
    runtime.reset()
    with runtime.failing(launches):
        print(failed(lambda: model.generate(cases.PROMPTS, 40, stop=())))
        failed(lambda: model.generate(cases.PROMPTS, 4, stop=()))
        failed(lambda: model.forward(cases.PROMPTS))
        failed(lambda: model.lane_seconds(cases.PROMPTS, 4))
        failed(lambda: cases.open_on("cuda", cases.OPT, cases.policy()))
        model.close()
        del dropped
    assert changes is not cases.RESIDENT or runtime.counters().graph_launches
print("ended")
"""


def test_a_device_that_fails_is_named_and_nothing_hangs():
    ran = subprocess.run([sys.executable, "-c", STICKY], capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr
    at_once, in_mid_call, in_a_graph, ended = ran.stdout.splitlines()
    assert ended == "ended"
    for error in (at_once, in_mid_call, in_a_graph):
        assert "the GPU has failed (CUDA error: an illegal memory access was encountered)" in error
        assert error is at_once or (" of token " in error and "failed on lane" in error)


@pytest.fixture
def model():
    with cases.open_on("cuda", cases.OPT, cases.policy(attend_on="cpu")) as opened:
        opened.generate(cases.PROMPTS, 4, stop=())
        yield opened


def test_out_of_memory_in_a_cell_and_the_next_call(model, monkeypatch):
    device = model._machine.device.torch_device
    before, calls, forward = torch.cuda.memory_allocated(device), 0, Head.forward

    def too_much(head, x, *rest):
        nonlocal calls
        calls += 1
        if calls == 5:
            torch.empty(200 * GIB, dtype=torch.uint8, device=x.device)
        return forward(head, x, *rest)

    monkeypatch.setattr(Head, "forward", too_much)
    try:
        model.generate(cases.PROMPTS, 4, stop=())
    except StepCapacityError as error:  # kept, as a caller does who tries again with less
        cause = error.__cause__
        assert isinstance(cause, CapacityError) and isinstance(cause.__cause__, torch.OutOfMemoryError)
        assert "of token 1, layer 5, batch 1 failed on lane compute" in str(error)
        assert "Tried to allocate 200.00 GiB" in str(error)
        held = torch.cuda.memory_allocated(device) - before
        assert held < 16 * KIB, "the error holds more of the call than ids"
        model.generate(cases.PROMPTS, 4, stop=())
    assert calls > 5


def test_buffers_that_a_gpu_has_no_room_for():
    store = CudaStore(cases.GPU)
    with pytest.raises(CapacityError, match="KV cache needs 200 GiB of cuda:0.*Tried to allocate 200.00 GiB"):
        store.allocate(200 * GIB, "KV cache")
    assert store.used == 0


def test_memory_that_cannot_be_pinned_is_pageable_and_no_kernel_is_blamed(caplog):
    expected = runtime.counters().pinned
    with runtime.refusing_to_pin(), cases.open_on("cuda", cases.OPT, cases.policy()) as model:
        model.generate(cases.PROMPTS, 4, stop=())
        assert runtime.counters().pinned == expected
        torch.zeros(1, device="cuda").add_(1)
    assert "cannot pin" in caplog.text and "ulimit -l" in caplog.text


def test_memory_that_cannot_be_unpinned_is_reported_and_no_kernel_is_blamed(caplog):
    store = HostStore(pin_for=cases.GPU)
    buffers = [store.allocate(MIB, "weights") for _ in range(2)]
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())  # as a second owner would
    store.release(buffers[0])
    torch.zeros(1, device="cuda").add_(1)
    store.close()
    torch.zeros(1, device="cuda").add_(1)
    assert caplog.text.count("1 MiB of pinned memory cannot be unpinned (CUDA error") == 2
