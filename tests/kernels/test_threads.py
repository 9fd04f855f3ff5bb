"""Threads of torch's operations in one thread of the process."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from flexgen.kernels import threads
from flexgen.kernels.threads import all_threads, take_no_others
from flexgen.memory.gpu import EmulatedDevice
from flexgen.results.trace import LaneName
from flexgen.schedule.steps import Op, Step

needs_openmp = pytest.mark.skipif(threads._setter() is None, reason="torch's OpenMP runtime is not found")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def grown(work):
    """How many threads of the system `work` has made that are still there."""
    before = set(os.listdir("/proc/self/task"))
    work()
    return len(set(os.listdir("/proc/self/task")) - before)  # those of an earlier test may end meanwhile


def large_operation():
    torch.zeros(4_000_000).add_(1)


@needs_openmp
@needs_proc
def test_a_thread_without_others_makes_no_team():
    def limited():
        take_no_others()
        return grown(large_operation)

    assert in_a_thread(lambda: grown(large_operation)) == 1
    assert in_a_thread(limited) == 0


@needs_openmp
def test_all_threads_within_a_thread_that_takes_none():
    def work():
        counts = []
        take_no_others()
        take_no_others()  # the same again
        counts.append(torch.get_num_threads())
        with pytest.raises(KeyError), all_threads():
            counts.append(torch.get_num_threads())
            raise KeyError
        return [*counts, torch.get_num_threads()]

    assert in_a_thread(work) == [1, 2, 1]
    assert torch.get_num_threads() == 2


def test_all_threads_changes_nothing_elsewhere():
    with all_threads():
        assert torch.get_num_threads() == 2


def test_without_the_runtime_nothing_changes(monkeypatch):
    monkeypatch.setattr(threads, "_setter", lambda: None)

    def work():
        take_no_others()
        with all_threads():
            return torch.get_num_threads()

    assert in_a_thread(work) == 2


@needs_openmp
@pytest.mark.parametrize("name", [LaneName.HOST, LaneName.TO_DEVICE, LaneName.FROM_DEVICE])
def test_lanes_without_arithmetic_of_an_emulated_device_take_one_thread(name):
    lanes, counts = EmulatedDevice().make_lanes(), []
    try:
        for lane in (name, LaneName.COMPUTE):
            lanes[lane].submit(
                lambda: counts.append(torch.get_num_threads()), (), Step(Op.COMPUTE, 0, 0)
            ).wait()
    finally:
        lanes.close()
    assert counts == [1, 2]
