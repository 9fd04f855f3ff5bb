"""What was taken together is given back together, whatever fails on the way."""

import gc
import itertools
import os
import sys

import pytest

from flexgen.memory.cpu import HostStore
from flexgen.memory.disk import DiskIO
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.units import BLOCK


@pytest.fixture
def disk(tmp_path):
    with DiskIO(threads=1) as io, DiskStore(tmp_path, io) as disk:
        yield disk


def test_all_of_it_is_given_back_once(disk):
    host, taken, undone = HostStore(), Taken(), []
    taken.buffer(host, 512, "a test")
    path = taken.file(disk, "a", BLOCK)
    taken.also(lambda: undone.append("also"))
    assert (host.used, disk.used) == (512, BLOCK)
    taken.close()
    taken.close()
    assert (host.used, disk.used, undone) == (0, 0, ["also"]) and not path.exists()


def test_the_rest_is_given_back_after_an_interrupt(disk):
    def interrupted():
        raise KeyboardInterrupt

    host, taken = HostStore(), Taken()
    taken.buffer(host, 512, "a test")
    taken.also(interrupted)
    taken.file(disk, "a", BLOCK)
    with pytest.raises(KeyboardInterrupt):
        taken.close()
    assert (host.used, disk.used) == (0, 0)


@pytest.fixture
def without_collector():
    """Objects of earlier tests must not end within one: an interrupt in __del__ is printed, not raised."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_interrupt_at_any_call_loses_nothing(disk, without_collector):
    """Ctrl-C wherever Python can handle a signal: as a function begins, and when one in C has returned."""
    package, host, at = os.sep + "flexgen" + os.sep, HostStore(), itertools.count()

    def interrupted_at(number, run):
        events = 0

        def profile(frame, event, argument):
            nonlocal events
            if package in frame.f_code.co_filename and event in ("call", "c_return"):
                events += 1
                if events == number:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            run()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(before)
        return events >= number

    def take(taken):
        taken.buffer(host, 512, "a test")
        taken.file(disk, "a", BLOCK)
        taken.buffer(host, 1024, "a test")

    disk.release(disk.scratch("first", BLOCK))  # makes the folder of the run
    for number in at:
        taken, given_back = Taken(), Taken()
        in_take = interrupted_at(number + 1, lambda taken=taken: take(taken))
        taken.close()
        assert (host.used, disk.used) == (0, 0), f"taking, event {number}"
        take(given_back)
        in_close = interrupted_at(number + 1, given_back.close)
        given_back.close()
        assert (host.used, disk.used) == (0, 0), f"giving back, event {number}"
        assert not [path for path in disk.root.rglob("*") if path.is_file()]
        if not (in_take or in_close):
            break
    assert number > 20


def test_what_is_dropped_is_given_back(disk):
    host, taken = HostStore(), Taken()
    taken.buffer(host, 512, "a test")
    path = taken.file(disk, "a", BLOCK)
    del taken
    assert (host.used, disk.used) == (0, 0) and not path.exists()


def test_an_interrupt_before_anything_is_taken_comes_out():
    class Early:
        @whole_or_closed
        def __init__(self):
            raise KeyboardInterrupt

        def close(self):
            self._taken.close()

    with pytest.raises(KeyboardInterrupt):
        Early()


def test_what_is_not_whole_takes_nothing():
    host = HostStore(capacity=1000)

    class Two:
        @whole_or_closed
        def __init__(self, nbytes):
            self._taken = Taken()
            for _ in range(2):
                self._taken.buffer(host, nbytes, "a test")

        def close(self):
            self._taken.close()

    with pytest.raises(Exception, match="a test needs"):
        Two(700)
    assert host.used == 0
    two = Two(nbytes=300)
    assert host.used == 600
    two.close()
    assert host.used == 0
