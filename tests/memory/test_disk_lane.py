"""Reads are started ahead, one after another, and end in order; nothing else about a lane changes."""

import gc
import random
import threading
import time
import weakref
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.errors import LaneError
from flexgen.memory.disk import DiskIO, Read, ReadJob
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.lanes import Cancelled, InlineLane, ThreadLane
from flexgen.results.trace import LaneName
from flexgen.schedule.steps import Op, Step
from flexgen.units import BLOCK

PATIENCE = 60  # seconds after which a test that hangs fails instead


def step(n=0):
    return Step(Op.LOAD_WEIGHTS, 0, 0, n)


class Flight:
    """A job in two halves that ends when the test says so, or is over."""

    made = []

    def __init__(self, error_in=None):
        self.started, self.waited, self.landed = threading.Event(), threading.Event(), threading.Event()
        self.over = False
        self._error_in = error_in
        self.made.append(self)

    def __call__(self):
        raise AssertionError("a lane that can start it ahead must not call it")

    def start(self):
        self.started.set()
        if self._error_in == "start":
            raise OSError("out of luck")
        return self

    def wait(self):
        self.waited.set()
        assert self.landed.wait(PATIENCE)
        self.over = True
        if self._error_in == "wait":
            raise OSError("out of luck")


@pytest.fixture
def lane():
    with closing(DiskLane(LaneName.DISK_READ).start()) as lane:
        yield lane
        land(*Flight.made)  # those of a test that failed too
        Flight.made.clear()


def ended(done):
    """Whether a job has ended, without waiting for it."""
    return not done._lock.locked()


def land(*flights):
    for flight in flights:
        flight.landed.set()


def test_the_next_job_is_started_while_one_is_on_its_way(lane):
    flights = [Flight() for _ in range(4)]
    dones = [lane.submit(flight, (), step(n)) for n, flight in enumerate(flights)]
    assert flights[1].started.wait(PATIENCE) and flights[0].waited.wait(PATIENCE)
    assert not any(map(ended, dones))
    assert not flights[2].started.is_set(), "two are on their way"
    land(flights[0])
    assert flights[2].started.wait(PATIENCE)
    dones[0].wait()
    assert not flights[3].started.is_set()
    land(*flights)
    dones[3].wait()


def test_jobs_end_in_order(lane):
    first, second = Flight(), Flight()
    plain = []
    dones = [lane.submit(job, (), step(n)) for n, job in enumerate((first, second))]
    assert second.started.wait(PATIENCE)
    land(second)
    assert not any(map(ended, dones)), "the first is still on its way"
    dones.append(lane.submit(lambda: plain.append(all(map(ended, dones[:1]))), (), step(2)))
    land(first)
    dones[2].wait()
    assert all(map(ended, dones)) and plain == [True]


def test_a_job_that_needs_the_one_before_starts_after_it(lane):
    """Through another lane, as a slot that is read into again: the lane must not wait for it in its own way."""
    with closing(ThreadLane(LaneName.COMPUTE).start()) as compute:
        first, second = Flight(), Flight()
        read = lane.submit(first, (), step(0))
        computed = compute.submit(lambda: None, (read,), step(0))
        again = lane.submit(second, (computed,), step(1))
        assert first.waited.wait(PATIENCE)
        assert not second.started.is_set()
        land(first)
        assert second.started.wait(PATIENCE)
        land(second)
        again.wait()


@pytest.mark.parametrize("half", ["start", "wait"])
def test_an_error_in_either_half_names_its_step(lane, half):
    before, bad, after = Flight(), Flight(half), Flight()
    dones = [lane.submit(flight, (), step(n)) for n, flight in enumerate((before, bad, after))]
    dependent = InlineLane(LaneName.HOST)
    land(before, bad, after)
    for done in (dones[1], dependent.submit(lambda: None, (dones[1],), step(9))):
        with pytest.raises(
            LaneError, match="load_weights of token 0, layer 0, batch 1 failed on lane disk_read"
        ) as caught:
            done.wait()
        assert isinstance(caught.value.__cause__, OSError)
    dones[0].wait()
    dones[2].wait()  # the lane lives on
    assert [event.step for event in lane.take_events(0.0)] == [step(0), step(2)]


def test_cancel_drops_what_has_not_begun_and_drain_waits_for_what_has(lane):
    flights = [Flight() for _ in range(4)]
    dones = [lane.submit(flight, (), step(n)) for n, flight in enumerate(flights)]
    assert flights[1].started.wait(PATIENCE)
    lane.cancel()
    threading.Timer(0.05, land, flights).start()
    lane.drain()
    assert [flight.over for flight in flights] == [True, True, False, False]
    for done in dones[:2]:
        done.wait()
    for done in dones[2:]:
        with pytest.raises(LaneError) as caught:
            done.wait()
        assert isinstance(caught.value.__cause__, Cancelled)
    last = Flight()
    land(last)
    lane.submit(last, (), step()).wait()  # the cancellation is over


def test_drain_waits_for_what_is_on_its_way(lane):
    flight = Flight()
    lane.submit(flight, (), step())
    assert flight.waited.wait(PATIENCE)
    threading.Timer(0.05, land, [flight]).start()
    lane.drain()
    assert flight.over


def test_busy_time_counts_no_second_twice(lane):
    flights = [Flight() for _ in range(3)]
    before = time.perf_counter()
    dones = [lane.submit(flight, (), step(n)) for n, flight in enumerate(flights)]
    assert flights[1].started.wait(PATIENCE)
    lane.submit(lambda: None, (), step(3))
    for flight in flights:
        assert flight.waited.wait(PATIENCE)
        land(flight)
    dones[-1].wait()
    lane.drain()
    events = lane.take_events(before)
    assert [event.step for event in events] == [step(n) for n in range(4)]
    assert all(0 <= event.start <= event.end <= time.perf_counter() - before for event in events)
    assert all(a.end <= b.start for a, b in zip(events, events[1:], strict=False))
    assert events[1].start == events[0].end  # it had begun before: no gap shows
    assert lane.take_events(before) == []


def test_close_ends_its_threads():
    lane = DiskLane(LaneName.DISK_READ).start()
    threads = [t for t in threading.enumerate() if t.name.startswith("flexgen-disk_read")]
    assert len(threads) == 2 and all(t.daemon for t in threads)
    lane.close()
    assert not any(t.is_alive() for t in threads)


def test_an_idle_lane_holds_no_job(lane, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * BLOCK))
    with DiskIO(threads=2, chunk=BLOCK) as io:
        target = aligned(4 * BLOCK)
        alive = weakref.ref(target)
        lane.submit(ReadJob(io, [Read(path, 0, target)]), (), step())
        lane.submit(target.zero_, (), step())
        lane.drain()
        del target
        gc.collect()
        assert alive() is None


def aligned(nbytes):
    whole = torch.zeros(nbytes + BLOCK, dtype=torch.uint8)
    return whole[-whole.data_ptr() % BLOCK :][:nbytes]


CONTENT = torch.randint(0, 256, (64 * BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@settings(max_examples=60)
@given(
    jobs=st.lists(
        st.tuples(st.integers(0, 70), st.integers(1, 12), st.booleans()),
        min_size=1,
        max_size=14,
    ),
    in_flight=st.integers(1, 4),
    slots=st.integers(1, 3),
    seed=st.integers(0, 1 << 16),
)
def test_reads_of_any_file_arrive_in_order(jobs, in_flight, slots, seed, tmp_path_factory):
    """Reads into a few slots, each used by another lane before the slot is read into again; some files end early,
    some jobs are plain. What a job saw when it ended is checked there."""
    path = tmp_path_factory.getbasetemp() / "content"
    if not path.exists():
        path.write_bytes(CONTENT.numpy().tobytes())
    shuffled = random.Random(seed)
    buffers = [aligned(12 * BLOCK) for _ in range(slots)]
    used = [() for _ in range(slots)]
    seen, ends = {}, []

    def use(n, start, length, buffer):
        for _ in range(shuffled.randrange(300)):
            pass
        ends.append(n)
        seen[n] = torch.equal(buffer[: length * BLOCK], CONTENT[start * BLOCK : (start + length) * BLOCK])

    with (
        DiskIO(threads=3, chunk=BLOCK) as io,
        closing(DiskLane(LaneName.DISK_READ, in_flight).start()) as lane,
        closing(ThreadLane(LaneName.COMPUTE).start()) as compute,
    ):
        dones = []
        for n, (start, length, plain) in enumerate(jobs):
            buffer = buffers[n % slots]
            read = ReadJob(io, [Read(path, start * BLOCK, buffer[: length * BLOCK])])
            done = lane.submit((lambda read=read: read()) if plain else read, used[n % slots], step(n))
            dones.append((compute.submit(lambda a=(n, start, length, buffer): use(*a), (done,), step(n)), n))
            # A slot whose read failed is free when that is known: the failure must not spread in this test.
            good = start + length <= 64
            used[n % slots] = (dones[-1][0],) if good else used[n % slots]
            if not good:
                with pytest.raises(LaneError, match=f"batch {n} failed on lane disk_read"):
                    done.wait()
        for done, n in dones:
            if jobs[n][0] + jobs[n][1] <= 64:
                done.wait()
        lane.drain()
        events = lane.take_events(0.0)
    good = [n for n, (start, length, _) in enumerate(jobs) if start + length <= 64]
    assert ends == good and all(seen[n] for n in good)
    assert [event.step.batch for event in events] == good
    assert all(a.end <= b.start for a, b in zip(events, events[1:], strict=False))
