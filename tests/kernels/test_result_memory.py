"""Memory of results that later results use again."""

import errno
import gc
import mmap
import multiprocessing
import resource
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels import tape
from flexgen.kernels.linear import linear
from flexgen.kernels.result_memory import HUGE_PAGE, RESULT_MEMORY, ResultMemory
from flexgen.kernels.results import empty_result
from flexgen.units import MIB

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise")


@pytest.fixture
def idle():
    """A memory before the first call."""
    return ResultMemory()


@pytest.fixture
def memory(idle):
    """A memory during a call."""
    idle.begin("the test")
    return idle


@pytest.fixture
def in_call():
    RESULT_MEMORY.begin("a call")
    yield
    RESULT_MEMORY.end("a call")


def address(view):
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def pages(views):
    return sum(-(-len(view) // PAGE) for view in views)


STEPS = st.lists(st.tuples(st.sampled_from(["take", "free"]), st.integers(1, 40 * PAGE)), max_size=40)


@given(STEPS)
def test_results_keep_their_values_and_memory_is_bounded_by_what_they_had_together(steps):
    memory, views, most = ResultMemory(), {}, 0
    memory.begin(0)
    for n, (what, number) in enumerate(steps):
        if what == "take":
            views[n] = memory.take(number)
            torch.frombuffer(views[n], dtype=torch.uint8).fill_(n)
            most = max(most, pages(views.values()))
        elif views:
            del views[sorted(views)[number % len(views)]]
        assert memory.resident <= most * PAGE
    for n, view in views.items():
        assert (torch.frombuffer(view, dtype=torch.uint8) == n).all()


def test_a_freed_result_is_used_again(memory):
    first = memory.take(3 * PAGE)
    place = address(first)
    del first
    assert address(memory.take(2 * PAGE + 1)) == place


def test_results_share_a_mapping_that_is_larger(memory):
    large = memory.take(8 * PAGE)
    place = address(large)
    del large
    small = [memory.take(3 * PAGE) for _ in range(2)]
    assert [address(view) - place for view in small] == [0, 3 * PAGE]
    assert memory.resident == 8 * PAGE


def test_unused_memory_is_returned_when_results_of_other_sizes_need_as_much(memory):
    small = memory.take(4 * PAGE)
    del small
    large = memory.take(6 * PAGE)  # it does not fit in the first mapping
    assert memory.resident == len(large) == 6 * PAGE


def test_a_part_of_a_mapping_is_returned(memory):
    views = [memory.take(size * PAGE) for size in (9, 3)]
    views[0] = None
    kept = memory.take(4 * PAGE)  # in the first mapping
    torch.frombuffer(kept, dtype=torch.uint8).fill_(7)
    views.append(memory.take(6 * PAGE))  # in a new one, in place of the rest of the first
    assert memory.resident == (4 + 3 + 6) * PAGE
    assert (torch.frombuffer(kept, dtype=torch.uint8) == 7).all()


def test_a_large_result_begins_with_a_huge_page(memory):
    assert address(memory.take(2 * HUGE_PAGE + 5)) % HUGE_PAGE == 0


def test_the_end_of_the_last_call_returns_what_no_result_uses(idle):
    idle.begin(1)
    idle.begin(2)
    kept, other = idle.take(2 * PAGE), idle.take(3 * PAGE)
    torch.frombuffer(kept, dtype=torch.uint8).fill_(5)
    del other
    idle.end(1)
    idle.end(1)
    assert idle.keeps and idle.resident == 5 * PAGE
    idle.end(2)
    assert not idle.keeps and idle.resident == 0
    assert (torch.frombuffer(kept, dtype=torch.uint8) == 5).all()
    del kept  # belongs to no memory any more
    idle.begin(3)
    assert len(idle.take(PAGE)) == idle.resident == PAGE


def test_threads_share_it(memory):
    wrong, taken = [], []

    def work(number):
        for size in range(1, 200):
            view = memory.take(size % 7 * PAGE + number)
            if view is None:  # another thread was in it
                continue
            taken.append(number)
            values = torch.frombuffer(view, dtype=torch.uint8).fill_(number)
            if not (values == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken and not wrong
    assert memory.resident <= 3 * 2 * 7 * PAGE  # the next one is made before the last one is freed


def test_large_results_of_a_call_use_it(in_call):
    x = empty_result((2, MIB), torch.bfloat16)
    assert RESULT_MEMORY.resident == x.nbytes
    assert x.fill_(3).sum(dtype=torch.float64) == 3 * x.numel()
    place = x.data_ptr()
    part = x[1:]
    del x
    assert empty_result((2, MIB), torch.bfloat16).data_ptr() != place  # a view still refers to it
    del part
    assert empty_result((2, MIB), torch.bfloat16).data_ptr() == place


def test_small_results_and_those_outside_of_calls_do_not_use_it(in_call):
    assert empty_result((MIB - 1,), torch.uint8).numel() == MIB - 1
    assert RESULT_MEMORY.resident == 0
    RESULT_MEMORY.end("a call")
    found = empty_result((MIB,), torch.uint8)
    assert found.numel() == MIB and RESULT_MEMORY.resident == 0


def test_a_result_that_cannot_be_allocated(in_call):
    with pytest.raises(RuntimeError, match=r"a result of \d+ bytes cannot be allocated"):
        empty_result((1 << 60,), torch.uint8)


def test_a_tape_has_memory_of_its_own(in_call):
    x, w = torch.randn(64, 64).bfloat16(), torch.randn(16384, 64).bfloat16()
    recorded = tape.record(lambda: linear(x, w))
    if recorded is None:
        pytest.skip("this processor has no kernel that can be recorded")
    found, made = recorded
    assert RESULT_MEMORY.resident == 0
    tape.replay([made], 0)
    torch.testing.assert_close(found, linear(x, w), rtol=0, atol=0)


def test_a_call_may_end_while_another_result_gets_its_memory(idle, monkeypatch):
    # As a finalizer that the garbage collector runs does.
    class Ends:
        def __del__(self):
            idle.end("a call")
            again.append(idle.take(PAGE))

    again = []
    idle.begin("a call")
    collect = ResultMemory._collect

    def with_garbage(self):
        monkeypatch.setattr(ResultMemory, "_collect", collect)
        cycle = Ends()
        cycle.itself = cycle
        del cycle
        gc.collect()
        collect(self)

    monkeypatch.setattr(ResultMemory, "_collect", with_garbage)
    view = idle.take(3 * PAGE)
    assert again == [None] and idle.resident == 0 and not idle.keeps
    torch.frombuffer(view, dtype=torch.uint8).fill_(1)


def test_a_result_that_is_freed_after_the_last_call(idle):
    idle.begin(1)
    views = [idle.take(PAGE), idle.take(PAGE)]
    idle.end(1)
    views.clear()
    idle.begin(2)
    assert len(idle.take(2 * PAGE)) == idle.resident == 2 * PAGE


def test_the_next_call_has_a_bound_of_its_own(idle):
    idle.begin(1)
    view = idle.take(9 * PAGE)
    del view
    idle.return_unused()
    idle.end(1)
    idle.begin(2)
    view = idle.take(2 * PAGE)
    del view
    view = idle.take(3 * PAGE)
    assert idle.resident == len(view)


def test_a_child_process_has_a_memory_of_its_own(in_call):
    kept = empty_result((MIB,), torch.uint8).fill_(9)
    with RESULT_MEMORY._lock:  # as if another thread were in it
        child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(kept,))
        child.start()
    child.join()
    assert child.exitcode == 0


def _use_in_child(kept):
    torch.set_num_threads(1)  # a child process has no threads of OpenMP, and would wait for them
    assert not RESULT_MEMORY.keeps and (kept == 9).all()
    RESULT_MEMORY.begin("its own")
    assert empty_result((2 * MIB,), torch.uint8).fill_(1).nbytes == RESULT_MEMORY.resident
    RESULT_MEMORY.end("its own")


class Refusing(mmap.mmap):
    """Refuses all advice, like a system without huge pages, or a process that locks its pages in memory."""

    def madvise(self, *_):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_system_that_refuses_advice(idle, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", Refusing)
    idle.begin(1)
    views = [idle.take(9 * PAGE), idle.take(2 * HUGE_PAGE)]
    views[0] = idle.take(3 * PAGE)
    views.append(idle.take(8 * PAGE))
    torch.frombuffer(views[0], dtype=torch.uint8).fill_(1)
    idle.end(1)
    assert idle.resident == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is not known")
def test_unused_memory_is_returned_if_the_address_space_is_limited(memory):
    size = 256 * MIB
    view = memory.take(size)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (in_use + size // 2, before[1]))
    try:
        del view
        assert len(memory.take(size + MIB)) == size + MIB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_unused_memory_is_returned_on_demand_and_before_a_recording(idle):
    idle.begin(1)
    kept, other = idle.take(2 * PAGE), idle.take(3 * PAGE)
    del other
    idle.return_unused()
    assert idle.resident == len(kept)
    del kept
    with idle.suspended():
        assert idle.resident == 0 and not idle.keeps
    assert idle.keeps


def test_a_small_result_in_a_huge_page_counts_the_whole_page_until_the_next_result(memory):
    large = memory.take(2 * HUGE_PAGE)
    del large
    kept = memory.take(PAGE)
    memory.return_unused()
    again = memory.take(PAGE)
    assert memory.resident in (len(kept) + len(again), HUGE_PAGE)  # without and with huge pages
