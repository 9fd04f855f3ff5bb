"""Measurements with simulated clocks and links, and complete but tiny ones on the real machine."""

import itertools
import threading
import time
from collections import namedtuple
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from flexgen.errors import CapacityError, RequestError
from flexgen.memory.cpu import HostStore
from flexgen.memory.disk import DiskIO
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.gpu import EmulatedDevice, Pace
from flexgen.memory.lanes import Lanes
from flexgen.memory.machine import Machine
from flexgen.memory.throttle import Throttle
from flexgen.models import open_model
from flexgen.policy import Policy, Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe import Effort, measure
from flexgen.probe import machine as machine_probe
from flexgen.probe.effort import FULL, Sampling, Stopwatch
from flexgen.probe.links import LinkProbe
from flexgen.probe.machine import capacities, within
from flexgen.probe.together import lost_shares, meanwhile
from flexgen.results.trace import LaneName
from flexgen.units import GIB, KIB, MIB
from flexgen.workload import Workload

TINY = Effort(
    hidden=128, heads=2, working_set=MIB, rows=(1, 4, 32), prompt=16, context=32, file=MIB, transfer=256 * KIB,
    layers=1, tokens=3, sampling=Sampling(repeats=1, seconds=0.0, together=0.01),
)  # fmt: skip


class Clock:
    """Time that passes only where someone sleeps."""

    def __init__(self):
        self.now = 0.0
        self._lock = threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self._lock:
            self.now += seconds


def test_a_time_is_the_median_and_the_first_call_does_not_count():
    clock = Clock()
    times = iter([100.0, 5.0, 1.0, 2.0, 9.0, 3.0])
    watch = Stopwatch(Sampling(repeats=5, seconds=1000.0), clock)
    assert watch.seconds(lambda: clock.sleep(next(times))) == 3.0


def test_long_work_is_not_repeated_for_ever():
    clock, calls = Clock(), itertools.count()
    watch = Stopwatch(Sampling(repeats=9, seconds=1.0), clock)
    watch.seconds(lambda: (next(calls), clock.sleep(10.0)))
    assert next(calls) == 1 + 3


def test_short_work_is_timed_many_calls_at_once_and_settled_once():
    clock, calls, settled = Clock(), itertools.count(), itertools.count()
    watch = Stopwatch(Sampling(repeats=3, seconds=1000.0), clock)

    def work():
        next(calls)
        clock.sleep(1e-3)

    def settle():
        next(settled)
        clock.sleep(5e-3)

    # The work is 1 ms; waiting for it takes 5 ms more, which many calls share.
    assert 1e-3 < watch.seconds(work, settle) <= 4e-3
    assert next(calls) > next(settled)


@pytest.fixture
def limited(tmp_path):
    """A machine whose link and disk are held at given rates, on a clock of ours."""
    clock = Clock()
    device = EmulatedDevice(link=3e6, disk=2e6)
    device.pace = Pace(3e6, clock, clock.sleep)
    io = DiskIO(throttle=Throttle(2e6, clock, clock.sleep))
    machine = Machine(device, HostStore(Tier.CPU), DiskStore(tmp_path, io), io)
    lanes = device.make_lanes()
    probe = LinkProbe(machine, lanes, TINY, Stopwatch(TINY.sampling, clock))
    yield probe, clock
    probe.close()
    assert not machine.host.used and not device.memory.used and not machine.disk.used
    lanes.close()
    machine.close()


@pytest.mark.parametrize(
    ("lane", "rate"),
    [
        (LaneName.TO_DEVICE, 3e6),
        (LaneName.FROM_DEVICE, 3e6),
        (LaneName.DISK_READ, 2e6),
        (LaneName.DISK_WRITE, 2e6),
    ],
)
def test_a_link_that_is_held_back_is_found_as_fast_as_it_is(limited, lane, rate):
    probe, _ = limited
    assert probe.bandwidth(lane) == pytest.approx(rate, rel=1e-6)


def test_a_small_job_is_timed_behind_the_one_before(limited):
    probe, _ = limited
    both = (LaneName.TO_DEVICE, LaneName.FROM_DEVICE)
    assert probe.latency(both, nbytes=4096) == pytest.approx(4096 / 3e6, rel=1e-6)


def test_the_start_of_a_read_is_the_time_that_it_takes_longer_than_in_a_row(limited):
    probe, clock = limited
    in_a_row, waits = TINY.transfer / 4 / 2e6, []

    def before():
        waits.append(clock())
        clock.sleep(7.0)

    start = probe.start_of_read(lambda read: [read() for _ in range(3)], before)
    assert start == pytest.approx(0, abs=1e-6 * in_a_row) and len(waits) == 3
    late = probe.start_of_read(lambda read: [read() + 0.5, read() + 1.5], before)
    assert late == pytest.approx(1.0, rel=1e-6)
    late = probe.start_of_read(lambda read: [read() + 1.0], before, lost=0.5)
    assert late == pytest.approx(1.0 - in_a_row, rel=1e-6), "a read in a row takes twice as long together"


@pytest.mark.parametrize("in_flight", [0, 2])
def test_the_start_of_a_computation_is_the_time_that_it_takes_longer_after_a_wait(limited, in_flight):
    """The first of all computations is not counted. Further reads may end during one of the computations."""
    probe, clock = limited
    of_reads = in_flight * TINY.transfer / 2e6 + 1e-6
    times = itertools.chain([100.0], itertools.cycle([3.0, 1.0, 6.0, 2.0]))
    start = probe.start_of_computation(lambda: clock.sleep(next(times)), in_flight)
    assert start == pytest.approx(3.0, abs=of_reads)
    assert probe._lanes[LaneName.DISK_READ].take_events(0.0) == [], "what nobody takes grows for ever"
    assert probe.start_of_computation(lambda: clock.sleep(1.0), in_flight) == pytest.approx(0, abs=of_reads)
    less = itertools.chain([100.0], itertools.cycle([1.0, 2.0]))
    assert probe.start_of_computation(lambda: clock.sleep(next(less)), in_flight) == 0, "noise"


def together():
    return any(thread.name == "flexgen-probe" for thread in threading.enumerate())


def test_slowdown_by_other_work_on_a_machine_that_slows_down():
    """`here` is twice as slow together with the other work, which is not slowed; all calls get slower over time."""
    clock, calls = Clock(), itertools.count()
    go, went = threading.Semaphore(0), threading.Semaphore(0)

    def here():
        pace = 2.0 ** (next(calls) // 2)  # a call alone, then one together
        if not together():
            return clock.sleep(pace)
        for _ in range(4):
            go.release()
            went.acquire()
        return clock.sleep(2 * pace)

    def others():
        if not together():
            clock.sleep(0.5)
        elif go.acquire(timeout=0.01):
            went.release()

    lost = lost_shares(here, others, 0.3, clock)
    assert lost[0] == pytest.approx(0.5)


def test_one_slow_moment_does_not_count():
    """The machine pauses once, during the other work."""
    clock, calls, go = Clock(), itertools.count(), threading.Semaphore(0)

    def here():
        go.release()
        clock.sleep(1000.0 if together() and next(calls) == 1 else 1.0)

    def others():
        if together():
            go.acquire(timeout=0.01)
        else:
            clock.sleep(1.0)

    assert lost_shares(here, others, 0.3, clock)[0] == 0.0


def test_a_failure_of_the_other_work_is_raised():
    def others():
        if together():
            raise OSError("the disk is gone")
        clock.sleep(1.0)

    clock = Clock()
    with pytest.raises(OSError, match="the disk is gone"):
        lost_shares(lambda: clock.sleep(1.0), others, 5.0, clock)


def test_results_of_other_work_that_runs_meanwhile():
    calls, here = itertools.count(), []

    def there():
        assert together() and threading.current_thread() is not threading.main_thread()
        return float(next(calls))

    assert meanwhile(lambda: here.append(together()), there, 4) == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(ZeroDivisionError):
        meanwhile(lambda: None, lambda: 1 / 0, 4)


@pytest.fixture(scope="module", params=["cpu", "emulated:memory=256MiB"])
def found(request, tmp_path_factory):
    """A tiny measurement of a device, and its progress."""
    folder, reports = tmp_path_factory.mktemp("offload"), []
    hardware = measure(request.param, folder, lambda *said: reports.append(said), effort=TINY)
    assert not list(folder.iterdir()), "files of the probe were left behind"
    return hardware, reports


def test_a_measurement_has_every_figure_that_a_prediction_asks_for(found, configs):
    hardware, _ = found
    assert hardware.topology.shares_host_memory == (Tier.GPU not in hardware.capacity)
    spec, _ = open_model(configs["opt"], "dummy")
    coded = {"cpu": {"percent": 50, "codec": "int4"}, "disk": {"percent": 50, "codec": "int8"}}
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        for attend_on in ("cpu", "gpu"):
            policy = Policy(
                gpu_batch_size=2, num_gpu_batches=2, weights=coded, cache=coded, attend_on=attend_on
            )
            report = predict(spec, policy, hardware, Workload(40, 3, 4), dtype=dtype).report
            assert report.prefill_s > 0 and report.decode_s > 0


def test_a_measurement_is_a_file(found, tmp_path):
    hardware, _ = found
    hardware.save(path := tmp_path / "machine.toml")
    assert Hardware.load(path) == hardware
    assert "measured by python -m flexgen.measure on 2" in hardware.source
    assert f"torch {torch.__version__}" in hardware.source


def test_rows_products_and_codecs_are_those_of_the_kernels(found):
    hardware, _ = found
    for dtype in ("float32", "bfloat16", "float16"):
        assert [rows for rows, _ in hardware.products[dtype]] == [1, 4, 32]
        for codec in ("int4", "int8"):
            assert hardware.decoding_rate(dtype, codec) > 0
    # Layers of an eighth of the width, with the same number of values as a wide one at 1 and at 32 rows.
    assert hardware.elementwise.keys() == hardware.around_attention.keys() >= {"float32"}
    assert hardware.elementwise.keys() == hardware.products.keys()
    for points in hardware.elementwise.values():
        assert [numbers for numbers, _ in points] == [rows * 23 * 128 for rows in (1, 32)]
    # A checkpoint in float16 is computed in another type on a CPU, as the engine does it.
    assert hardware.dtype_for("float16") in ("float32", "bfloat16")
    assert hardware.dtype_for("bfloat16") == "bfloat16"


def test_progress_counts_to_its_end(found):
    _, reports = found
    assert [n for n, _, _ in reports] == list(range(len(reports)))
    assert {total for _, total, _ in reports} == {len(reports) - 1}
    labels = [label for _, _, label in reports]
    assert len(set(labels)) == len(labels)


def test_capacity_is_the_limit_of_a_plan(tmp_path):
    machine = Machine.open("emulated:memory=64MiB", tmp_path)
    try:
        found = capacities(machine)
        assert found[Tier.GPU] == 64 * MIB
        assert found[Tier.CPU] == pytest.approx(machine.limits()[Tier.CPU], rel=0.1)
        assert found[Tier.DISK] == pytest.approx(machine.disk.free, rel=0.1)
        whole = machine_probe.installed(machine)
        assert whole[Tier.GPU] == 64 * MIB and all(whole[tier] >= found[tier] for tier in Tier)
    finally:
        machine.close()


def test_a_small_device_is_measured_in_whole_blocks(tmp_path):
    large = replace(TINY, hidden=512, heads=8, working_set=256 * MIB, transfer=32 * MIB, layers=FULL.layers)
    found = measure("emulated:memory=10MB", tmp_path, effort=large)
    assert found.capacity[Tier.GPU] == 10**7
    assert {"to_device", "from_device", "disk_read", "disk_write", "host"} == set(found.bandwidth)
    fitted = within(large, 10**7, "emulated")
    assert fitted.transfer % 4096 == 0 and 10**6 < fitted.transfer <= 10**7 // 8
    assert (fitted.hidden, fitted.heads) == (128, 2)  # a layer takes no more than a quarter of the device
    assert within(FULL, 64 * GIB, "cuda:0") == FULL


def test_a_device_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(CapacityError, match=r"device emulated has 4 MiB .* at least 8 MiB"):
        measure("emulated:memory=4MiB", tmp_path, effort=TINY)


def test_transfers_that_the_disk_would_refuse(tmp_path):
    machine = Machine.open("emulated", tmp_path)
    try:
        for transfer in (128 * KIB, MIB + 512):
            with pytest.raises(ValueError, match=f"transfer is {transfer} bytes; .* at least 262144"):
                LinkProbe(machine, Lanes({}), replace(TINY, transfer=transfer), Stopwatch(TINY.sampling))
    finally:
        machine.close()


@pytest.mark.parametrize("lane", [LaneName.TO_DEVICE, LaneName.FROM_DEVICE, LaneName.DISK_READ])
def test_moves_with_other_work_run_on_their_lane(limited, lane):
    """Not on the calling thread: on a GPU, all work would share one stream, and nothing would overlap."""
    probe, clock = limited
    submitted, there = [], probe._lanes[lane]
    submit = there.submit

    def seen(job, after, step):
        submitted.append(submit(job, after, step))
        return submitted[-1]

    there.submit = seen
    move = probe.mover(lane)
    for n in (1, 2):
        before = clock()
        move()
        assert len(submitted) % n == 0 and len(submitted) >= n and clock() > before  # the move is over
    assert there.take_events(0.0) == [], "what nobody takes grows for ever"


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match="'tpu' is not known"):
        measure("tpu", tmp_path)


@pytest.mark.parametrize(("others", "share"), [(0.0, 0.0), (1.0, 0.25), (3.0, 0.75)])
def test_other_programs_are_distinguished_from_this_one(monkeypatch, others, share):
    """In 2 s on two processors, this program runs for 1 s of 4 and `others` for some."""
    times = namedtuple("times", "user system idle")
    spent = {"all": times(7.0, 0.0, 9.0), "own": times(5.0, 0.0, 0.0)}
    monkeypatch.setattr("psutil.cpu_times", lambda: spent["all"])
    monkeypatch.setattr("psutil.Process.cpu_times", lambda self: spent["own"])
    watch = machine_probe._Others()
    spent = {"all": times(8.0 + others, 0.0, 12.0 - others), "own": times(6.0, 0.0, 0.0)}
    assert watch.share() == pytest.approx(share)


@pytest.mark.parametrize("device", ["cpu", "emulated:memory=4GiB"])
def test_the_sizes_of_a_measurement_fit_the_host(monkeypatch, tmp_path, device):
    monkeypatch.setattr("flexgen.memory.machine.available_bytes", lambda cached: 256 * MIB)
    with closing(Machine.open(device, tmp_path)) as machine, closing(machine.make_lanes()) as lanes:
        measurement = machine_probe._Measurement(machine, lanes, FULL, time.perf_counter)
        assert measurement._effort.working_set <= 32 * MIB and measurement._effort.transfer <= 32 * MIB
        measurement._links.close()


def test_tiers_in_host_memory_share_its_capacity(monkeypatch, tmp_path):
    monkeypatch.setattr("flexgen.memory.machine.available_bytes", lambda cached: 100 * MIB)
    with closing(Machine.open("emulated:memory=64MiB", tmp_path)) as machine:
        found = capacities(machine)
        assert found[Tier.GPU] + found[Tier.CPU] <= 95 * MIB
