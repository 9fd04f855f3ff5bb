"""Lanes serve in order, wait for the jobs that were named, and report errors to the caller."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import pytest
import torch

from flexgen.errors import CapacityError, LaneError
from flexgen.memory import threads
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.lanes import Cancelled, InlineLane, Lanes, ThreadLane
from flexgen.results.trace import LaneName
from flexgen.schedule.steps import Op, Step

STEP = Step(Op.COMPUTE, 3, 1, 2)
LOAD = Step(Op.LOAD_WEIGHTS, 0, 1, 2)
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


@pytest.fixture
def make_lane():
    lanes = []

    def make(name=LaneName.COMPUTE):
        lanes.append(ThreadLane(name).start())
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


@pytest.fixture
def lane(make_lane):
    return make_lane()


def test_a_lane_serves_in_order(lane):
    ran = []
    dones = [lane.submit(lambda n=n: ran.append(n), (), STEP) for n in range(100)]
    dones[-1].wait()
    assert ran == list(range(100))
    for done in dones:
        done.wait()  # all are over, and waiting twice is allowed
    dones[0].wait()


def test_lanes_run_in_parallel(make_lane):
    gate = Gate()
    blocked = make_lane().submit(gate, (), STEP)
    assert gate.begun.wait(PATIENCE)
    make_lane(LaneName.DISK_READ).submit(lambda: None, (), LOAD).wait()  # returns while the gate is shut
    gate.opened.set()
    blocked.wait()


def test_a_job_waits_for_jobs_of_other_lanes(make_lane):
    disk, link, compute = make_lane(LaneName.DISK_READ), make_lane(LaneName.TO_DEVICE), make_lane()
    gate, ran = Gate(), []
    read = disk.submit(gate, (), LOAD)
    copied = link.submit(lambda: ran.append("copy"), (read,), LOAD)
    computed = compute.submit(lambda: ran.append("compute"), (read, copied), STEP)
    assert gate.begun.wait(PATIENCE)
    assert ran == []
    gate.opened.set()
    computed.wait()
    assert ran == ["copy", "compute"]
    (reading,), (copying,), (computing,) = (lane.take_events(0.0) for lane in (disk, link, compute))
    assert reading.end <= copying.start and copying.end <= computing.start


def test_an_error_reaches_the_one_who_waits(lane):
    done = lane.submit(boom, (), STEP)
    with pytest.raises(
        LaneError, match="compute of token 3, layer 1, batch 2 failed on lane compute"
    ) as caught:
        done.wait()
    assert isinstance(caught.value.__cause__, Boom)
    assert "Boom: out of luck" in str(caught.value)
    lane.submit(lambda: None, (), STEP).wait()  # the lane lives on


def test_what_depends_on_a_failure_does_not_run_and_tells_of_the_same(make_lane):
    ran = []
    failed = make_lane(LaneName.DISK_READ).submit(boom, (), LOAD)
    dependent = make_lane(LaneName.TO_DEVICE).submit(lambda: ran.append(1), (failed,), LOAD)
    further = make_lane().submit(lambda: ran.append(2), (dependent,), STEP)
    inline = InlineLane(LaneName.HOST).submit(lambda: ran.append(3), (further,), STEP)
    errors = []
    for done in (failed, dependent, further, inline):
        with pytest.raises(LaneError) as caught:
            done.wait()
        errors.append(caught.value)
    assert ran == []
    assert all(error is errors[0] for error in errors)
    assert "load_weights of token 0, layer 1, batch 2 failed on lane disk_read" in str(errors[0])


def test_an_exit_inside_a_job_is_reported(lane):
    with pytest.raises(LaneError) as caught:
        lane.submit(sys.exit, (), STEP).wait()
    assert isinstance(caught.value.__cause__, SystemExit)


def test_cancel_drops_what_has_not_begun(lane):
    gate, ran = Gate(), []
    running = lane.submit(gate, (), STEP)
    dropped = [lane.submit(lambda: ran.append("dropped"), (), STEP) for _ in range(3)]
    assert gate.begun.wait(PATIENCE)
    lane.cancel()
    gate.opened.set()
    lane.drain()
    running.wait()  # what had begun has ended well
    for done in dropped:
        with pytest.raises(LaneError) as caught:
            done.wait()
        assert isinstance(caught.value.__cause__, Cancelled)
    assert ran == []
    lane.submit(lambda: ran.append("next"), (), STEP).wait()
    assert ran == ["next"]


def test_drain_returns_when_nothing_runs(lane):
    gate, ended = Gate(), []
    lane.submit(gate, (), STEP)
    lane.submit(lambda: ended.append(True), (), STEP)
    threading.Thread(target=lambda: gate.begun.wait(PATIENCE) and gate.opened.set()).start()
    lane.drain()
    assert ended == [True]


@pytest.mark.parametrize("kind", [ThreadLane, DiskLane])
def test_drain_does_not_wake_a_lane_without_jobs(kind):
    lane = kind(LaneName.DISK_READ)  # not started, so that it cannot answer
    drain = threading.Thread(target=lane.drain, daemon=True)
    drain.start()
    drain.join(PATIENCE)
    assert not drain.is_alive()


def test_drain_does_not_raise(lane):
    lane.submit(boom, (), STEP)
    lane.drain()


def test_close_ends_the_thread():
    lane, threads = ThreadLane(LaneName.HOST).start(), []
    lane.submit(lambda: threads.append(threading.current_thread()), (), STEP)
    lane.close()
    assert len(threads) == 1 and not threads[0].is_alive()
    assert threads[0] is not threading.current_thread() and threads[0].name == "flexgen-host"


def test_events_tell_step_and_times(lane):
    before = time.perf_counter()
    lane.submit(lambda: None, (), LOAD)
    lane.submit(lambda: None, (), STEP)
    lane.submit(boom, (), STEP)  # what fails has no event
    lane.drain()
    after = time.perf_counter()
    first, second = lane.take_events(origin=before)
    assert (first.step, first.lane, second.step) == (LOAD, LaneName.COMPUTE, STEP)
    assert 0 <= first.start <= first.end <= second.start <= second.end <= after - before
    assert lane.take_events(before) == []


def test_jobs_run_in_inference_mode(lane):
    modes = []
    lane.submit(lambda: modes.append(torch.is_inference_mode_enabled()), (), STEP).wait()
    assert modes == [True]
    assert not torch.is_inference_mode_enabled()


def test_an_idle_lane_holds_no_job(lane):
    tensor = torch.zeros(1)
    alive = weakref.ref(tensor)
    lane.submit(tensor.zero_, (), STEP)
    lane.drain()
    del tensor
    gc.collect()
    assert alive() is None


def test_an_inline_lane_runs_at_once_in_the_caller():
    lane, threads = InlineLane(LaneName.COMPUTE), []
    done = lane.submit(lambda: threads.append(threading.current_thread()), (), STEP)
    assert threads == [threading.current_thread()]
    done.wait()
    (event,) = lane.take_events(0.0)
    assert (event.step, event.lane) == (STEP, LaneName.COMPUTE) and event.start <= event.end
    assert lane.take_events(0.0) == []


def test_an_inline_lane_waits_for_other_lanes(lane):
    gate, ran = Gate(), []
    first = lane.submit(lambda: (gate(), ran.append("thread")), (), LOAD)
    threading.Thread(target=lambda: gate.begun.wait(PATIENCE) and gate.opened.set()).start()
    InlineLane(LaneName.HOST).submit(lambda: ran.append("inline"), (first,), STEP)
    assert ran == ["thread", "inline"]


def test_an_inline_lane_tells_of_an_error_when_asked():
    done = InlineLane(LaneName.COMPUTE).submit(boom, (), STEP)
    with pytest.raises(LaneError, match="compute of token 3") as caught:
        done.wait()
    assert isinstance(caught.value.__cause__, Boom)


def test_an_interrupt_of_an_inline_job_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    lane = InlineLane(LaneName.COMPUTE)
    with pytest.raises(KeyboardInterrupt):
        lane.submit(interrupted, (), STEP)
    lane.submit(lambda: None, (), STEP).wait()


def test_lanes_stop_collect_and_close():
    gate = Gate()

    class OpenedByCancel(ThreadLane):
        def cancel(self):
            super().cancel()
            gate.opened.set()

    shared, disk = ThreadLane(LaneName.COMPUTE), OpenedByCancel(LaneName.DISK_READ)
    lanes = Lanes({LaneName.COMPUTE: shared, LaneName.HOST: shared, LaneName.DISK_READ: disk})
    assert set(lanes) == {LaneName.COMPUTE, LaneName.HOST, LaneName.DISK_READ} and len(lanes) == 3
    assert lanes[LaneName.HOST] is lanes[LaneName.COMPUTE]
    threads = []

    def remember():
        threads.append(threading.current_thread())

    read = lanes[LaneName.DISK_READ].submit(remember, (), LOAD)
    lanes[LaneName.HOST].submit(remember, (read,), STEP)
    lanes.stop(cancel=False)
    assert [event.step for event in lanes.take_events(0.0)] == [LOAD, STEP]  # once each, by their start
    assert lanes.take_events(0.0) == []
    lanes[LaneName.DISK_READ].submit(gate, (), LOAD)
    dropped = lanes[LaneName.DISK_READ].submit(remember, (), LOAD)
    assert gate.begun.wait(PATIENCE)
    lanes.close()
    assert not any(thread.is_alive() for thread in threads) and len(lanes) == 0
    with pytest.raises(LaneError) as caught:
        dropped.wait()
    assert isinstance(caught.value.__cause__, Cancelled)


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), CapacityError("no memory for a thread")], ids=repr
)
@pytest.mark.parametrize("begun", range(4))
def test_lanes_that_cannot_all_be_started_leave_no_thread(begun, interrupt, monkeypatch):
    """Whether the thread at which it comes has begun or not; and then another try works."""
    made, start = [], threads.start

    def fail_once(thread):
        made.append(thread)
        if len(made) == begun + 1:
            if isinstance(interrupt, KeyboardInterrupt):
                start(thread)
            raise interrupt
        start(thread)

    monkeypatch.setattr(threads, "start", fail_once)
    kinds = {LaneName.HOST: ThreadLane, LaneName.DISK_READ: DiskLane, LaneName.DISK_WRITE: ThreadLane}
    with pytest.raises(type(interrupt)) as raised:
        Lanes({name: kind(name) for name, kind in kinds.items()})
    assert raised.value is interrupt and len(made) == begun + 1
    for thread in made:
        if thread.ident is not None:
            thread.join(PATIENCE)
        assert not thread.is_alive()
    with closing(Lanes({name: kind(name) for name, kind in kinds.items()})):
        assert len(made) == begun + 5


def test_lanes_that_nobody_got_end_their_threads(monkeypatch):
    """Ctrl-C arrives when they are whole and their maker has not stored them yet."""
    made, start = [], threads.start
    monkeypatch.setattr(threads, "start", lambda thread: (made.append(thread), start(thread)))
    lanes = Lanes(
        {name: kind(name) for name, kind in ((LaneName.HOST, ThreadLane), (LaneName.DISK_READ, DiskLane))}
    )
    assert len(made) == 3 and all(thread.is_alive() for thread in made)
    del lanes
    gc.collect()
    for thread in made:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_an_interrupt_does_not_cut_the_wait_for_idle_lanes_short():
    idle = []

    class Interrupted(ThreadLane):
        interrupts = 2

        def drain(self):
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            super().drain()
            idle.append(self.name)

    names = LaneName.DISK_READ, LaneName.DISK_WRITE
    lanes = Lanes({name: Interrupted(name) for name in names})
    with pytest.raises(KeyboardInterrupt):
        lanes.stop(cancel=True)
    assert idle == list(names)
    lanes[LaneName.DISK_READ].submit(lambda: None, (), LOAD).wait()  # not dropped
    lanes.close()


def test_a_forgotten_lane_does_not_hold_up_the_exit():
    script = (
        "import threading\n"
        "from flexgen.memory.lanes import ThreadLane\n"
        "from flexgen.schedule.steps import Op, Step\n"
        "from flexgen.results.trace import LaneName\n"
        "begun = threading.Event()\n"
        "def forever():\n"
        "    begun.set()\n"
        "    threading.Event().wait()\n"
        "ThreadLane(LaneName.DISK_READ).start().submit(forever, (), Step(Op.COMPUTE, 0, 0, 0))\n"
        "begun.wait()\n"
        "print('leaving')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.strip()) == (0, "leaving"), done.stderr
