"""No race under any policy and order; and with each kind of wait taken out, one is found."""

import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from piece_sizes import piece_sizes
from simulated import cases, runtime
from simulated.groups import simulated_kernels
from simulated.numbers import Numbers
from simulated.races import watched
from simulated.threads import in_every_thread

from flexgen.errors import LaneError
from flexgen.memory.cuda import CudaDevice, CudaStore
from flexgen.memory.gpu import open_device
from flexgen.memory.stream_lanes import EventDone, StreamLane
from flexgen.results.trace import LaneName

STOPS = range(0, cases.VOCAB, 3)


def test_a_planted_race_is_found():
    with watched() as races:
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        x = torch.zeros(64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            x.add_(1)
        with torch.cuda.stream(second):
            x * 2
        assert races.hazards.total() == 1
        second.wait_stream(first)
        with torch.cuda.stream(second):
            x * 2
    assert races.hazards.total() == 1


def test_a_planted_race_with_a_graph_is_found():
    """The graph's work is that of the stream that it is launched on, not of the one that captured it."""
    with watched() as races:
        capturing, first, second = (torch.cuda.Stream() for _ in range(3))
        x, graph = torch.zeros(64, device="cuda"), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(capturing):
            graph.capture_begin()
            x.add_(1)
            graph.capture_end()
        with torch.cuda.stream(second):
            x.mul_(2)
        assert races.hazards.total() == 0
        with torch.cuda.stream(first):
            graph.replay()
        assert races.hazards.total() == 1
        second.wait_stream(first)
        with torch.cuda.stream(second):
            graph.replay()
    assert races.hazards.total() == 1


def test_a_pinned_buffer_is_watched():
    runtime.reset()
    pinned = torch.zeros(64, dtype=torch.uint8).pin_memory()
    there = torch.ones(64, dtype=torch.uint8, device="cuda")
    there.copy_(pinned, non_blocking=True)
    pinned.fill_(3)  # while the copy may still read it
    torch.cuda.synchronize()
    assert runtime.counters().overwritten_uploads == 1
    pinned.copy_(there, non_blocking=True)
    assert pinned.tolist() != there.cpu().tolist()  # garbage: nobody has waited for this copy's stream
    torch.cuda.synchronize()


@settings(max_examples=10, phases=cases.WITHOUT_SHRINKING)
@given(
    config=st.sampled_from([cases.OPT, cases.LLAMA]),
    policy=cases.policies(),
    order=cases.orders(),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_no_policy_and_order_races(config, policy, order, dtype):
    runtime.reset()
    with (
        cases.valid_ids(),
        watched() as races,
        cases.open_on("cuda", config, policy, dtype, order=order) as model,
    ):
        model.generate(cases.PROMPTS, 4, stop=())
        model.generate(cases.PROMPTS, 6, stop=STOPS)
        model.forward(cases.PROMPTS[:4])
        torch.cuda.synchronize()
    assert races.hazards.total() == 0, str(races)
    assert runtime.counters().hazards == 0
    assert races.operations > 100


@settings(max_examples=5, phases=cases.WITHOUT_SHRINKING)
@given(policy=cases.policies(), order=cases.orders(), dtype=st.sampled_from(["float32", "float16"]))
def test_no_policy_and_order_races_on_a_ring_of_pages(policy, order, dtype):
    runtime.reset()
    with (
        piece_sizes(page_tokens=4, memory_page_tokens=4),
        cases.valid_ids(),
        watched() as races,
        cases.open_on("cuda", cases.MISTRAL, policy, dtype, order=order) as model,
    ):
        model.generate(cases.PROMPTS, 6, stop=STOPS)
        torch.cuda.synchronize()
    assert races.hazards.total() == 0, str(races)
    assert runtime.counters().hazards == 0
    assert races.operations > 100


@settings(max_examples=5, phases=cases.WITHOUT_SHRINKING)
@given(
    policy=cases.policies(),
    order=cases.orders(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_no_policy_and_order_races_in_a_mixture(policy, order, dtype):
    """With experts that are multiplied in one launch, wherever they are stored."""
    runtime.reset()
    with (
        simulated_kernels() as kernels,
        cases.valid_ids(),
        watched() as races,
        cases.open_on("cuda", cases.MIXTURE, policy, dtype, order=order) as model,
    ):
        model.generate(cases.PROMPTS, 6, stop=STOPS)
        torch.cuda.synchronize()
    assert races.hazards.total() == 0, str(races)
    assert runtime.counters().hazards == 0
    assert races.operations > 100
    assert kernels.calls or dtype == "bfloat16"


@pytest.mark.parametrize(
    "config",
    [cases.OPT, cases.LLAMA, cases.MISTRAL, cases.MIXTURE],
    ids=["opt", "llama", "windows", "mixture"],
)
def test_graphs_do_not_race(config, grouped_kernels):
    with (
        piece_sizes(page_tokens=4, memory_page_tokens=4),
        cases.valid_ids(),
        watched() as races,
        cases.open_on("cuda", config, cases.policy(**cases.RESIDENT), "float16") as model,
    ):
        runtime.reset()
        model.generate(cases.PROMPTS, 14, stop=())
        model.generate(cases.PROMPTS, 24, stop=STOPS)
        torch.cuda.synchronize()
    assert runtime.counters().graph_launches > 14
    assert races.hazards.total() == 0, str(races)
    assert races.operations > 1000


def test_buffers_are_filled_before_a_lane_uses_them():
    """Zeros are written on the default stream, which no lane waits for."""
    store, device = CudaStore(cases.GPU), open_device("cuda")
    for settled in (False, True):
        with watched() as races:
            buffer = store.allocate(64, "test")
            if settled:
                device.settle()
            with torch.cuda.stream(torch.cuda.Stream()):
                buffer.add_(1)
        assert (races.hazards.total() == 0) == settled
        torch.cuda.synchronize()
        store.release(buffer)


def streams(waiting, awaited):
    """Streams of the lane `waiting` do not wait for jobs of the lane `awaited`."""

    def take_out(patch):
        begin, precede, lanes = StreamLane.__init__, EventDone.precede, {}

        def remember(lane, name, device):
            begin(lane, name, device)
            lanes[lane.stream.cuda_stream] = name

        def skip(done, stream):
            if (lanes[stream.cuda_stream], done._lane) != (waiting, awaited):
                precede(done, stream)

        patch.setattr(StreamLane, "__init__", remember)
        patch.setattr(EventDone, "precede", skip)

    return take_out


def threads(waiting, awaited):
    """The thread of the lane `waiting` does not wait for jobs of the lane `awaited`."""

    def take_out(patch):
        wait = EventDone.wait

        def skip(done):
            here = threading.current_thread().name
            if (here, done._lane) != (f"flexgen-{waiting.value}", awaited):
                wait(done)

        patch.setattr(EventDone, "wait", skip)

    return take_out


def queries(patch):
    """The host does not wait for the queries that it computes attention of."""
    patch.setattr(CudaDevice, "wait_for_compute", lambda device: None)


def nothing(patch):
    pass


THIRDS, BY_THE_HOST = dict(attend_on="gpu"), dict(attend_on="cpu")
WITHOUT_OVERLAP = BY_THE_HOST | dict(overlap=False)
ONLY_WEIGHTS_MOVE = cases.RESIDENT | dict(weights={"disk": 100})
IN_HOST_MEMORY = dict(weights={"gpu": 100}, cache={"cpu": 100}, activations={"cpu": 100}, attend_on="gpu")
COMPUTE, TO_DEVICE, FROM_DEVICE = LaneName.COMPUTE, LaneName.TO_DEVICE, LaneName.FROM_DEVICE
# Other pairs of lanes wait for each other too. Taking one of those waits out has shown no hazard in these cases.
WAITS = {
    "nothing": (nothing, THIRDS),
    "compute for what it reads": (streams(COMPUTE, TO_DEVICE), THIRDS),
    "compute for what it overwrites": (streams(COMPUTE, FROM_DEVICE), IN_HOST_MEMORY),
    "downloads for what they read": (streams(FROM_DEVICE, COMPUTE), THIRDS),
    "uploads for what they overwrite": (streams(TO_DEVICE, COMPUTE), THIRDS),
    "disk reads for what they overwrite": (threads(LaneName.DISK_READ, COMPUTE), ONLY_WEIGHTS_MOVE),
    "disk writes for what they read": (threads(LaneName.DISK_WRITE, FROM_DEVICE), THIRDS),
    "the host for what it reads": (threads(LaneName.HOST, FROM_DEVICE), BY_THE_HOST),
    "the host for queries": (queries, WITHOUT_OVERLAP),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_that_is_taken_out_is_missed(name, monkeypatch):
    """As a hazard, or, where a host thread reads what has not arrived, as wrong ids or an error about them."""
    take_out, changes = WAITS[name]
    policy = cases.policy(**changes)
    expected = ids_on("cpu", policy)
    take_out(monkeypatch)
    runtime.reset()
    found = None
    with in_every_thread(Numbers), watched() as races, contextlib.suppress(LaneError):
        found = ids_on("cuda", policy)
    hazards = races.hazards.total() + runtime.counters().hazards
    right = found is not None and np.array_equal(found, expected)
    assert (hazards == 0 and right) == (take_out is nothing)


def ids_on(device, policy):
    with cases.open_on(device, cases.OPT, policy) as model:
        return model.generate(cases.PROMPTS, 3, stop=())
