"""Lanes of CUDA streams: on fake streams that record their calls, and on a GPU where there is one."""

import contextlib
import gc
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch

from flexgen import OptLM
from flexgen.errors import LaneError
from flexgen.memory import stream_lanes
from flexgen.memory.cpu import HostStore
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.gpu import EmulatedDevice
from flexgen.memory.lanes import Cancelled, Lanes, ThreadLane
from flexgen.memory.stream_lanes import CopyLane, StreamLane
from flexgen.policy import Policy
from flexgen.results.trace import LaneName
from flexgen.schedule.steps import Op, Step

STEP = Step(Op.COMPUTE, 3, 1, 2)
LOAD = Step(Op.LOAD_WEIGHTS, 0, 1, 2)
TO_DEVICE, FROM_DEVICE = LaneName.TO_DEVICE, LaneName.FROM_DEVICE
PATIENCE = 60  # seconds after which a test that hangs fails instead


class Boom(Exception):
    pass


def boom():
    raise Boom("out of luck")


class Gate:
    """A job that says that it has begun, and then waits to be let through."""

    def __init__(self):
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.opened.wait(PATIENCE)


class Device:
    """What streams and events stand for: a clock in seconds, the current stream of each thread, and a fault."""

    def __init__(self):
        self.now, self.fault, self.current = 0.0, None, threading.local()

    def check(self):
        if self.fault is not None:
            raise RuntimeError(self.fault)


@pytest.fixture
def gpu(monkeypatch):
    """Takes the place of torch's streams and events; all that is enqueued is over at once."""
    device = Device()

    class Stream:
        def __init__(self, place):
            self.calls = []

        def wait_event(self, event):
            assert event.at is not None, "an event that was not recorded orders nothing"
            self.calls.append(("wait", event))

        def synchronize(self):
            device.check()
            self.calls.append("synchronize")

    class Event:
        def __init__(self, enable_timing=False, blocking=False):
            self.at, self.timed, self.blocking = None, enable_timing, blocking

        def record(self, stream):
            device.check()
            self.at = device.now

        def synchronize(self):
            assert self.at is not None, "an event that was not recorded is no one's end"
            device.check()

        def query(self):
            device.check()
            return True

        def elapsed_time(self, later):
            device.check()
            assert self.timed and later.timed
            return (torch.tensor(later.at - self.at, dtype=torch.float32) * 1e3).item()

    @contextmanager
    def current(stream):
        before = getattr(device.current, "stream", None)
        device.current.stream = stream
        try:
            yield
        finally:
            device.current.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return device


@pytest.fixture
def lanes(gpu):
    """(a link, the compute lane, a thread lane), with what their jobs write to: (name, thread) of each."""
    place = torch.device("cpu")
    made = (
        CopyLane(LaneName.TO_DEVICE, place).start(),
        StreamLane(LaneName.COMPUTE, place),
        ThreadLane(LaneName.HOST).start(),
    )
    yield made
    for lane in made:
        lane.close()


def enqueue(gpu, name, ran=None, seconds=0.0):
    """A job that puts `name` on the current stream, where it takes `seconds`; `ran` gets the thread."""

    def job():
        gpu.current.stream.calls.append(name)
        gpu.now += seconds
        if ran is not None:
            ran.append(threading.current_thread())

    return job


def jobs_of(lane):
    stream = lane._on_stream.stream if isinstance(lane, CopyLane) else lane.stream
    return [call for call in stream.calls if isinstance(call, str) and call != "synchronize"]


def test_a_copy_behind_what_is_on_streams_is_enqueued_at_once(gpu, lanes):
    link, compute, host = lanes
    ended = host.submit(lambda: None, (), LOAD)
    ended.wait()
    computed, ran = compute.submit(enqueue(gpu, "compute"), (), STEP), []
    done = link.submit(enqueue(gpu, "copy", ran), (computed, ended), LOAD)
    assert ran == [threading.current_thread()] and done.enqueued
    (waited, event), copied = link._on_stream.stream.calls
    assert (waited, copied) == ("wait", "copy") and event.blocking  # hosts wait for it too, without spinning
    done.wait()


def test_who_submits_a_copy_never_waits_for_the_host(gpu, lanes):
    link, compute, host = lanes
    gate, ran = Gate(), []
    read = host.submit(gate, (), LOAD)
    assert gate.begun.wait(PATIENCE)
    copied = link.submit(enqueue(gpu, "first", ran), (read,), LOAD)
    behind = link.submit(enqueue(gpu, "second", ran), (), STEP)  # needs nothing, but its turn comes later
    compute.submit(enqueue(gpu, "compute"), (), STEP).wait()  # the device computes meanwhile
    assert jobs_of(link) == [] and not copied.enqueued and not behind.enqueued
    gate.opened.set()
    behind.wait()
    copied.wait()
    assert jobs_of(link) == ["first", "second"]
    assert {thread.name for thread in ran} == {"flexgen-to_device"}
    link.drain()
    link.submit(enqueue(gpu, "third", ran), (), STEP)  # idle again
    assert ran[-1] is threading.current_thread()


def test_what_needs_a_copy_waits_until_it_is_enqueued_and_then_for_its_event(gpu, lanes):
    link, compute, host = lanes
    gate = Gate()
    copied = link.submit(enqueue(gpu, "copy"), (host.submit(gate, (), LOAD),), LOAD)
    threading.Thread(target=lambda: gate.begun.wait(PATIENCE) and gate.opened.set()).start()
    compute.submit(enqueue(gpu, "compute"), (copied,), STEP).wait()
    assert jobs_of(link) == ["copy"]
    (waited, event), computed = compute.stream.calls
    assert (waited, computed) == ("wait", "compute")
    assert event is copied._on_stream._event


def test_the_order_is_that_of_submission_whatever_jobs_wait_for(gpu, lanes):
    link, compute, host = lanes
    for n in range(200):
        needs = {0: (), 1: (host.submit(lambda: None, (), LOAD),), 2: (compute.submit(boom, (), LOAD),)}[
            n % 3
        ]
        link.submit(enqueue(gpu, str(n)), needs, LOAD)
    link.drain()
    assert jobs_of(link) == [str(n) for n in range(200) if n % 3 < 2]


@pytest.mark.parametrize("queued", [False, True])
def test_errors_reach_who_waits_and_name_the_step(gpu, lanes, queued):
    link, compute, host = lanes
    gate, ran = Gate(), []
    needs = (host.submit(gate, (), LOAD),) if queued else ()
    failed = link.submit(boom, needs, LOAD)
    dependent = compute.submit if not queued else host.submit  # a stream lane would wait for the gate here
    further = dependent(lambda: ran.append(1), (failed,), STEP)
    gate.opened.set()
    for done in (failed, further):
        with pytest.raises(
            LaneError, match="load_weights of token 0, layer 1, batch 2 failed on lane to_"
        ) as caught:
            done.wait()
        assert isinstance(caught.value.__cause__, Boom)
    with pytest.raises(LaneError, match="load_weights of token 0"):
        failed.precede(compute.stream)
    behind_the_failed_read = link.submit(enqueue(gpu, "never"), (host.submit(boom, (), STEP),), LOAD)
    with pytest.raises(LaneError, match="compute of token 3, layer 1, batch 2 failed on lane host"):
        behind_the_failed_read.wait()
    assert ran == [] and jobs_of(link) == []
    link.submit(enqueue(gpu, "next"), (), LOAD).wait()  # the lane lives on
    link.drain()
    assert [event.step for event in link.take_events(0.0)] == [LOAD]


def test_an_exit_inside_a_queued_copy_is_reported(gpu, lanes):
    link, _, host = lanes

    def leave():
        raise SystemExit

    gate = Gate()
    done = link.submit(leave, (host.submit(gate, (), LOAD),), LOAD)
    gate.opened.set()
    with pytest.raises(LaneError) as caught:
        done.wait()
    assert isinstance(caught.value.__cause__, SystemExit)


def test_cancel_drops_copies_that_are_not_enqueued(gpu, lanes):
    link, _, host = lanes
    gate = Gate()
    dropped = [link.submit(enqueue(gpu, "dropped"), (host.submit(gate, (), LOAD),), LOAD)]
    assert gate.begun.wait(PATIENCE)
    link.cancel()
    gate.opened.set()  # what they needed ends well
    dropped += [link.submit(enqueue(gpu, "dropped"), (), LOAD) for _ in range(2)]
    link.drain()
    for done in dropped:
        with pytest.raises(LaneError) as caught:
            done.wait()
        assert isinstance(caught.value.__cause__, Cancelled)
    assert jobs_of(link) == []
    link.submit(enqueue(gpu, "next"), (), LOAD).wait()
    assert jobs_of(link) == ["next"]
    link.cancel()  # an idle lane: a job that would be enqueued at once is dropped too
    dropped = link.submit(enqueue(gpu, "dropped"), (), LOAD)
    link.drain()
    with pytest.raises(LaneError):
        dropped.wait()
    assert jobs_of(link) == ["next"]


def test_drain_ends_with_an_idle_stream(gpu, lanes):
    link, _, host = lanes
    gate = Gate()
    link.submit(enqueue(gpu, "copy"), (host.submit(gate, (), LOAD),), LOAD)
    threading.Thread(target=lambda: gate.begun.wait(PATIENCE) and gate.opened.set()).start()
    link.drain()
    assert link._on_stream.stream.calls == ["copy", "synchronize"]
    gpu.fault = "CUDA error: an illegal memory access was encountered"
    link.drain()  # does not raise


def test_copies_of_pageable_memory_are_the_threads(gpu):
    host, ran = HostStore(), []
    assert host.pageable
    link = CopyLane(LaneName.FROM_DEVICE, torch.device("cpu"), host).start()
    try:
        link.submit(enqueue(gpu, "copy", ran), (), LOAD).wait()
        host.pageable = False
        link.drain()
        link.submit(enqueue(gpu, "copy", ran), (), LOAD).wait()
    finally:
        link.close()
    assert [thread.name for thread in ran] == ["flexgen-from_device", threading.current_thread().name]


def test_queued_copies_run_in_inference_mode_and_leave_nothing_behind(gpu, lanes):
    link, _, host = lanes
    modes, tensor, gate = [], torch.zeros(1), Gate()
    alive, read = weakref.ref(tensor), host.submit(gate, (), LOAD)
    link.submit(lambda: modes.append(torch.is_inference_mode_enabled()), (read,), LOAD)
    link.submit(tensor.zero_, (), LOAD)
    gate.opened.set()
    link.drain()
    del tensor
    gc.collect()
    assert modes == [True] and alive() is None


def test_a_closed_link_has_no_thread(gpu):
    link = CopyLane(LaneName.TO_DEVICE, torch.device("cpu")).start()
    link.close()
    assert not link._thread.is_alive()


def test_durations_are_exact_however_long_ago_the_lane_was_made(gpu, monkeypatch):
    lane = StreamLane(LaneName.COMPUTE, torch.device("cpu"))
    gpu.now = 1e6  # eleven days: the milliseconds of a float are 64 apart
    monkeypatch.setattr(stream_lanes.time, "perf_counter", lambda: 500.0 + gpu.now)
    lane.submit(enqueue(gpu, "first", seconds=0.00103), (), LOAD)
    gpu.now += 1.0
    lane.submit(enqueue(gpu, "second", seconds=0.00207), (), STEP)
    gpu.now += 1000.3  # the rest of the call, whose milliseconds are 1/16 apart
    first, second = lane.take_events(origin=400.0 + 1e6)
    assert (first.step, second.step) == (LOAD, STEP)
    assert first.end - first.start == pytest.approx(0.00103, rel=1e-4)
    assert second.end - second.start == pytest.approx(0.00207, rel=1e-4)
    assert (first.start, second.start) == pytest.approx((100.0, 101.00103), abs=1e-4)
    assert lane.take_events(0.0) == []


def test_a_long_call_keeps_few_events_and_all_times(gpu, monkeypatch):
    lane = StreamLane(LaneName.COMPUTE, torch.device("cpu"))
    monkeypatch.setattr(stream_lanes.time, "perf_counter", lambda: gpu.now)
    alive = []
    for n in range(1000):
        lane.submit(enqueue(gpu, "job", seconds=0.001), (), STEP._replace(token=n))
        gpu.now += 0.25
        if n % 100 == 99:
            gc.collect()
            alive.append(sum(type(found) is torch.cuda.Event for found in gc.get_objects()))
    assert max(alive) < 2 * 64 + 10
    events = lane.take_events(0.0)
    assert [event.step.token for event in events] == list(range(1000))
    for n, event in enumerate(events):
        assert (event.start, event.end) == pytest.approx((n * 0.251, n * 0.251 + 0.001), abs=1e-4)


def test_a_device_that_has_failed_has_no_events_and_raises_where_it_is_waited_for(gpu, lanes):
    link, compute, _ = lanes
    dones = [lane.submit(enqueue(gpu, "work"), (), LOAD) for lane in (link, compute)]
    gpu.fault = "CUDA error: device-side assert triggered"
    for lane, done in zip((link, compute), dones, strict=True):
        with pytest.raises(LaneError, match="device-side assert"):
            done.wait()
        lane.drain()
        assert lane.take_events(0.0) == []
    gpu.fault = None
    assert link.take_events(0.0) == []


class StreamedDevice(EmulatedDevice):
    """Host memory behind the lanes of a GPU."""

    def make_lanes(self, host=None):
        links = {name: CopyLane(name, self.torch_device, host) for name in (TO_DEVICE, FROM_DEVICE)}
        threads = {name: ThreadLane(name) for name in (LaneName.HOST, LaneName.DISK_WRITE)}
        disk = {LaneName.DISK_READ: DiskLane(LaneName.DISK_READ)}
        return Lanes(
            links | threads | disk | {LaneName.COMPUTE: StreamLane(LaneName.COMPUTE, self.torch_device)}
        )


@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_model_gives_the_same_on_stream_lanes(gpu, monkeypatch, saved, tmp_path, attend_on, pinned):
    """Every kind of job of the links, enqueued at once or by their threads, as the order of the model has it."""
    thirds = {"gpu": 34, "cpu": 33, "disk": 33}
    policy = Policy(
        gpu_batch_size=3, num_gpu_batches=3, weights=thirds, cache=thirds, activations=thirds, attend_on=attend_on,
        sep_layer=False,
    )  # fmt: skip
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 4, 4, 7, 2, 5, 6, 3)]

    def generated(device):
        with OptLM(saved("opt"), policy, device=device, offload_dir=tmp_path, progress=False) as model:
            return model.generate(prompts, 6, stop=()), {
                event.lane for event in model.stats.timing.trace.events
            }

    expected, _ = generated(EmulatedDevice())
    if pinned:
        monkeypatch.setattr(HostStore, "pageable", property(lambda store: False, lambda store, _: None))
    found, lanes = generated(StreamedDevice())
    assert (found == expected).all()
    assert lanes == set(LaneName)


@pytest.fixture
def host_lane():
    lanes = []

    def make(name):
        lanes.append(ThreadLane(name).start())
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


@pytest.mark.gpu
def test_stream_lanes_wait_for_each_other_and_for_threads(host_lane):
    device = torch.device("cuda", 0)
    link, compute = CopyLane(LaneName.TO_DEVICE, device).start(), StreamLane(LaneName.COMPUTE, device)
    disk, back = host_lane(LaneName.DISK_READ), host_lane(LaneName.HOST)
    source = torch.zeros(1 << 24, pin_memory=True)
    target, result = torch.zeros(1 << 24, device=device), torch.zeros(1 << 24, device=device)
    answers = []
    torch.cuda.synchronize()
    read = disk.submit(lambda: source.fill_(2.0), (), LOAD)
    copied = link.submit(lambda: target.copy_(source, non_blocking=True), (read,), LOAD)
    computed = compute.submit(lambda: torch.mul(target, 3.0, out=result), (copied,), STEP)
    back.submit(lambda: answers.append(result.cpu()), (computed,), STEP).wait()
    assert (answers[0] == 6.0).all()
    link.drain()
    compute.drain()
    origin = time.perf_counter()
    (copying,), (computing,) = link.take_events(origin), compute.take_events(origin)
    assert (copying.step, copying.lane) == (LOAD, LaneName.TO_DEVICE)
    assert copying.start <= copying.end and computing.start <= computing.end <= 0
    assert link.take_events(origin) == []
    link.close()


@pytest.mark.gpu
def test_a_stream_lane_tells_of_errors_and_of_earlier_ones(host_lane):
    compute, ran = StreamLane(LaneName.COMPUTE, torch.device("cuda", 0)), []
    failed = compute.submit(boom, (), STEP)
    read = host_lane(LaneName.DISK_READ).submit(boom, (), LOAD)
    dependent = compute.submit(lambda: ran.append(1), (read,), STEP)
    for done, step in ((failed, "compute of token 3"), (dependent, "load_weights of token 0")):
        with pytest.raises(LaneError, match=step) as caught:
            done.wait()
        assert isinstance(caught.value.__cause__, Boom)
    assert ran == []
    compute.drain()
    assert compute.take_events(0.0) == []
