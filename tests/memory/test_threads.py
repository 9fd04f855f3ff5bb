"""A thread begins, or the caller learns why it cannot."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from flexgen.errors import CapacityError, RequestError
from flexgen.memory import threads

# Less is free than a thread may need. The stack of the first thread is kept for the second: `Thread.start` takes no
# more, and would wait for ever for a thread that finds no memory for its first objects.
FULL = """
import resource, threading
from flexgen.memory import threads
from flexgen.errors import CapacityError

first = threading.Thread(target=int)
threads.start(first)
first.join()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (8 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
second = threading.Thread(target=int)
try:
    threads.start(second)
    raised = None
except CapacityError as error:
    raised = error
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert raised is not None and "ulimit -v" in str(raised) and not second.is_alive()
threads.start(second)
second.join()
print("done")
"""


def test_a_thread_that_has_no_memory_is_refused() -> None:
    ended = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and ended.stdout == "done\n", ended.stdout + ended.stderr


def test_no_memory_for_a_stack_is_a_capacity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    thread = threading.Thread(target=int)
    with monkeypatch.context() as patch:
        patch.setattr(threads.mmap, "mmap", refuse)
        with pytest.raises(CapacityError, match="address space.*RLIMIT_AS"):
            threads.start(thread)
    threads.start(thread)
    thread.join()


def test_a_limit_of_threads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", refuse)
    with pytest.raises(RequestError, match="ulimit -u"):
        threads.start(threading.Thread(target=int))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_while_a_thread_starts_is_not_taken_for_a_limit(
    interrupt: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        """As Thread.start, whose condition has no lock to release where its wait is interrupted."""
        try:
            raise interrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(type(interrupt)) as raised:
        threads.start(threading.Thread(target=int))
    assert raised.value is interrupt


def test_a_pool_refuses_as_a_thread_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each thread that it may have to start; what it has started goes on serving."""

    def refuse(*args: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with threads.Pool(2, "flexgen-test") as pool:
        with monkeypatch.context() as patch:
            patch.setattr(threads.mmap, "mmap", refuse)
            with pytest.raises(CapacityError, match="RLIMIT_AS"):
                pool.submit(int)
        assert [pool.submit(int).result() for _ in range(3)] == [0, 0, 0]
        monkeypatch.setattr(threads.mmap, "mmap", refuse)
        assert pool.submit(int).result() == 0
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)


def test_a_limit_of_threads_is_named_for_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with threads.Pool(1, "flexgen-test") as pool:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "_start_new_thread", refuse)
            with pytest.raises(RequestError, match="ulimit -u"):
                pool.submit(int)
        assert pool.submit(int).result() == 0
