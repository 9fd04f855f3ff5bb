"""What was taken together is given back together, whatever fails on the way."""

import pytest

from flexgen.memory.cpu import HostStore
from flexgen.memory.direct_file import BLOCK
from flexgen.memory.disk import DiskIO
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.taken import Taken, whole_or_closed


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
