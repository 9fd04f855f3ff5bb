"""Transfers that bypass the page cache: the right bytes, or an error and nothing in flight."""

import errno
import fcntl
import mmap
import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import CheckpointError
from flexgen.memory import disk
from flexgen.memory.disk import DiskIO, Read, Write, aligned_span
from flexgen.memory.throttle import Throttle
from flexgen.units import BLOCK


def memory(nbytes):
    """Zeroed host memory that begins at a multiple of BLOCK."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]


def noise(nbytes, seed=0):
    return memory(nbytes).random_(0, 256, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def io(request):
    with DiskIO(threads=3, chunk=2 * BLOCK, direct=request.param) as io:
        yield io


@pytest.fixture
def path(tmp_path):
    """A file of ten blocks and 100 bytes; `content(path)` is what is in it."""
    path = tmp_path / "weights.bin"
    path.write_bytes(noise(10 * BLOCK + 100).numpy().tobytes())
    return path


def content(path):
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


@given(offset=st.integers(0, 1 << 50), nbytes=st.integers(0, 1 << 50))
def test_aligned_span_is_the_smallest_cover(offset, nbytes):
    start, length, lead = aligned_span(offset, nbytes)
    assert start % BLOCK == 0 and length % BLOCK == 0
    assert 0 <= lead < BLOCK and start + lead == offset
    assert 0 <= start + length - (offset + nbytes) < BLOCK


def test_write_then_read(io, tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(8 * BLOCK))
    first, second = noise(8 * BLOCK, 1), noise(5 * BLOCK, 2)
    io.write([Write(paths[0], 0, first), Write(paths[1], 2 * BLOCK, second)])
    got_first, got_second = memory(8 * BLOCK), memory(5 * BLOCK)
    io.read([Read(paths[0], 0, got_first), Read(paths[1], 2 * BLOCK, got_second)])
    assert torch.equal(got_first, first)
    assert torch.equal(got_second, second)
    assert torch.equal(content(paths[1])[: 2 * BLOCK], torch.zeros(2 * BLOCK, dtype=torch.uint8))
    assert torch.equal(content(paths[1])[2 * BLOCK : 7 * BLOCK], second)


def test_reading_an_aligned_superset_past_the_end(io, path):
    offset, nbytes = 3 * BLOCK + 17, 7 * BLOCK + 83  # up to the last byte
    start, length, lead = aligned_span(offset, nbytes)
    target = memory(length)
    io.read([Read(path, start, target, needed=lead + nbytes)])
    assert torch.equal(target[lead : lead + nbytes], content(path)[offset:])
    assert not target[lead + nbytes :].any()


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK, 2 * BLOCK, 5 * BLOCK + 1])
def test_any_file_length(io, tmp_path, nbytes):
    path = tmp_path / "short"
    path.write_bytes(noise(nbytes).numpy().tobytes())
    target = memory(6 * BLOCK)
    io.read([Read(path, 0, target, needed=nbytes)])
    assert torch.equal(target[:nbytes], content(path)) if nbytes else not target.any()


def test_truncated_file(io, path):
    with pytest.raises(CheckpointError) as caught:
        io.read([Read(path, 8 * BLOCK, memory(2 * BLOCK)), Read(path, 10 * BLOCK, memory(BLOCK), needed=101)])
    message = str(caught.value)
    assert str(path) in message
    assert f"wanted 101 bytes at offset {10 * BLOCK}, got 100" in message
    assert f"ends at {10 * BLOCK + 100}" in message
    with pytest.raises(CheckpointError, match=f"wanted {BLOCK} bytes at offset {30 * BLOCK}, got 0"):
        io.read([Read(path, 30 * BLOCK, memory(BLOCK))])


def test_missing_file_is_named(io, path):
    absent = path.with_name("absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        io.read([Read(path, 0, memory(BLOCK)), Read(absent, 0, memory(BLOCK))])
    with pytest.raises(FileNotFoundError, match="absent"):
        io.write([Write(absent, 0, memory(BLOCK))])


@pytest.mark.parametrize(
    ("offset", "target", "message"),
    [
        (1, memory(BLOCK), "offset 1 must be"),
        (-BLOCK, memory(BLOCK), "offset -4096 must be"),
        (0, memory(BLOCK + 1), "length 4097 must be"),
        (0, memory(3 * BLOCK)[64 : 64 + BLOCK], "address .* must be"),
        (0, memory(2 * BLOCK)[::2], "contiguous"),
        (0, memory(BLOCK).view(2, -1), "1-D"),
        (0, memory(BLOCK).view(torch.int16), "int16"),
    ],
)
def test_unaligned_requests_are_refused(io, path, offset, target, message):
    with pytest.raises(ValueError, match=message):
        io.read([Read(path, offset, target)])
    with pytest.raises(ValueError, match=message):
        io.write([Write(path, offset, target)])


def test_needed_must_lie_inside_the_read(io, path):
    with pytest.raises(ValueError, match="needs 4097 bytes of a read of 4096"):
        io.read([Read(path, 0, memory(BLOCK), needed=BLOCK + 1)])


def test_chunk_must_be_whole_blocks():
    with pytest.raises(ValueError, match="chunk is 1000"):
        DiskIO(chunk=1000)


@pytest.mark.parametrize("most", [BLOCK, BLOCK + 512, 700])
def test_partial_transfers_are_continued(io, path, monkeypatch, most):
    preadv, pwritev = os.preadv, os.pwritev
    expected = content(path)
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: cut(preadv, fd, views, offset, most))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: cut(pwritev, fd, views, offset, most))
    target = memory(11 * BLOCK)
    io.read([Read(path, 0, target, needed=len(expected))])
    assert torch.equal(target[: len(expected)], expected)
    source = noise(10 * BLOCK, 3)
    io.write([Write(path, 0, source)])
    assert torch.equal(content(path)[: 10 * BLOCK], source)


def cut(move, fd, views, offset, most):
    """A transfer of at most `most` bytes, as a kernel may make one.

    A direct descriptor is read by whole blocks all the same, since the disk accepts nothing else.
    """
    direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    wanted = min(most, len(views[0]))
    if direct and wanted % BLOCK:
        scratch = memory(BLOCK * -(-wanted // BLOCK))
        if move.__name__ == "preadv":
            got = min(move(fd, [scratch.numpy().data], offset), wanted)
            views[0][:got] = scratch.numpy().data[:got]
            return got
        scratch[:] = torch.frombuffer(views[0], dtype=torch.uint8)[: len(scratch)]
        return min(move(fd, [scratch.numpy().data], offset), wanted)
    return move(fd, [views[0][:wanted]], offset)


def test_refused_direct_open_falls_back_to_buffered(path, monkeypatch):
    os_open = os.open

    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os_open(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    check_reads_buffered(path)


def test_refused_direct_read_falls_back_to_buffered(path, monkeypatch):
    preadv = os.preadv

    def refuse(fd, views, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    check_reads_buffered(path)


def check_reads_buffered(path):
    with DiskIO(threads=4, chunk=BLOCK) as io:
        target = memory(10 * BLOCK)
        io.read([Read(path, 0, target)])
        assert torch.equal(target, content(path)[: 10 * BLOCK])


def test_buffered_reads_leave_the_page_cache(path, monkeypatch):
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: advised.append(call[1:]))
    with DiskIO(chunk=8 * BLOCK, direct=False) as io:
        io.read([Read(path, 0, memory(10 * BLOCK))])
    dont_need = os.POSIX_FADV_DONTNEED
    assert sorted(advised) == [(0, 8 * BLOCK, dont_need), (8 * BLOCK, 2 * BLOCK, dont_need)]


def test_an_error_surfaces_when_nothing_is_in_flight(path, monkeypatch):
    preadv, failed = os.preadv, threading.Event()
    running = []

    def read(fd, views, offset):
        if offset == BLOCK:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        running.append(offset)
        assert failed.wait(60)  # the others are still under way when one fails
        count = preadv(fd, views, offset)
        running.remove(offset)
        return count

    monkeypatch.setattr(os, "preadv", read)
    with DiskIO(threads=3, chunk=BLOCK) as io:
        with pytest.raises(OSError, match=f"at offset {BLOCK}: Input/output error.*weights.bin") as caught:
            io.read([Read(path, 0, memory(10 * BLOCK))])
        assert caught.value.errno == errno.EIO and caught.value.filename == str(path)
        assert running == []
        monkeypatch.undo()
        target = memory(BLOCK)
        io.read([Read(path, 0, target)])  # still usable
        assert torch.equal(target, content(path)[:BLOCK])


def test_an_interrupted_caller_leaves_nothing_in_flight(path, monkeypatch):
    preadv, wait, interrupted = os.preadv, disk.wait, threading.Event()
    running = []

    def read(fd, views, offset):
        running.append(offset)
        assert interrupted.wait(60)
        count = preadv(fd, views, offset)
        running.remove(offset)
        return count

    def interrupt_once(futures, **options):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return wait(futures, **options)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(disk, "wait", interrupt_once)
    with DiskIO(threads=3, chunk=BLOCK) as io, pytest.raises(KeyboardInterrupt):
        io.read([Read(path, 0, memory(10 * BLOCK))])
    assert interrupted.is_set() and running == []


def test_an_interrupt_between_two_jobs_of_a_transfer_drops_the_first(path, monkeypatch):
    wait, busy, jobs = disk.wait, threading.Event(), []

    def wait_for_all(futures, **options):
        busy.set()
        return wait(futures, **options)

    monkeypatch.setattr(disk, "wait", wait_for_all)
    with DiskIO(threads=1, chunk=BLOCK) as io:
        submit = io._pool.submit

        def interrupt_the_second(*job):
            if jobs:
                raise KeyboardInterrupt
            jobs.append(submit(*job))
            return jobs[0]

        submit(busy.wait, 60)
        monkeypatch.setattr(io._pool, "submit", interrupt_the_second)
        monkeypatch.setattr(io, "_shares", lambda parts: ([part] for part in parts))
        with pytest.raises(KeyboardInterrupt):
            io.read([Read(path, 0, memory(10 * BLOCK))])
        assert len(jobs) == 1 and jobs[0].cancelled()


def test_reads_that_were_started_end_when_they_are_waited_for(path, monkeypatch):
    preadv, release, reading = os.preadv, threading.Event(), threading.Semaphore(0)

    def read(fd, views, offset):
        reading.release()
        assert release.wait(60)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", read)
    with DiskIO(threads=4, chunk=BLOCK) as io:
        first, second = memory(3 * BLOCK), memory(2 * BLOCK)
        transfers = [io.start_read([Read(path, 0, first)]), io.start_read([Read(path, 3 * BLOCK, second)])]
        for _ in range(4):  # one of the second's chunks is read beside those of the first
            assert reading.acquire(timeout=60)
        assert all(transfer.under_way for transfer in transfers)
        release.set()
        for transfer in transfers:
            transfer.wait()
        assert torch.equal(torch.cat([first, second]), content(path)[: 5 * BLOCK])
        small = io.start_read([Read(path, 0, memory(BLOCK))])
        assert not small.under_way
        small.wait()


def test_a_read_that_cannot_be_started_leaves_nothing_in_flight(path):
    with DiskIO(threads=2, chunk=BLOCK) as io:
        with pytest.raises(FileNotFoundError, match="absent"):
            io.start_read(
                [Read(path, 0, memory(5 * BLOCK)), Read(path.with_name("absent"), 0, memory(BLOCK))]
            )
        assert not io.files.in_use()
        transfer = io.start_read([Read(path, 8 * BLOCK, memory(6 * BLOCK))])
        with pytest.raises(CheckpointError, match="the file ends at"):
            transfer.wait()
        assert not io.files.in_use()


@given(lengths=st.lists(st.integers(0, 9), max_size=40), threads=st.integers(1, 7), chunk=st.integers(1, 4))
def test_pieces_are_dealt_evenly(lengths, threads, chunk):
    parts = [(n, memoryview(bytes(min(length, chunk) * BLOCK))) for n, length in enumerate(lengths)]
    with DiskIO(threads, chunk * BLOCK) as io:
        shares = list(io._shares(parts))
    assert [part for share in shares for part in share] == parts
    for share in shares:
        assert len(share) <= -(-len(parts) // threads)
        assert sum(len(view) for _, view in share) <= chunk * BLOCK


def test_many_small_pieces_are_read_by_several_threads(path, monkeypatch):
    preadv, readers = os.preadv, set()

    def read(fd, views, offset):
        readers.add(threading.current_thread())
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", read)
    with DiskIO(threads=4) as io:
        targets = [memory(BLOCK) for _ in range(10)]
        io.read([Read(path, n * BLOCK, target) for n, target in enumerate(targets)])
        assert threading.current_thread() not in readers
        assert torch.equal(torch.cat(targets), content(path)[: 10 * BLOCK])
        readers.clear()
        io.read([Read(path, n * BLOCK, target) for n, target in enumerate(targets[:2])])
        assert readers == {threading.current_thread()}


def test_writes_that_make_no_progress_end(path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda *call: 0)
    with DiskIO() as io, pytest.raises(OSError, match="nothing written at offset 0"):
        io.write([Write(path, 0, memory(BLOCK))])


class Clock:
    """Time that passes only in `sleep` and by hand."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_bandwidth_is_one_pace_for_all_transfers(path):
    clock = Clock()
    with DiskIO(throttle=Throttle(BLOCK, clock, clock.sleep)) as io:
        io.read([Read(path, 0, memory(2 * BLOCK))])
        io.write([Write(path, 0, memory(3 * BLOCK))])
        assert clock.slept == [2, 3]
        clock.now += 50  # an idle disk saves nothing up
        io.read([Read(path, 0, memory(BLOCK)), Read(path, 0, memory(BLOCK))])
        assert clock.slept == [2, 3, 2]
        io.throttle.bandwidth = None
        io.read([Read(path, 0, memory(BLOCK))])
        assert len(clock.slept) == 3


def test_time_spent_transferring_counts(path):
    # Calls of the clock, in order: start and end of each transfer. The first takes 1.5 s of its 2 s, the
    # second starts while the disk is still busy with the first and queues behind it.
    times, slept = iter([10.0, 11.5, 11.0, 11.6]), []
    with DiskIO(throttle=Throttle(BLOCK, lambda: next(times), slept.append)) as io:
        io.read([Read(path, 0, memory(2 * BLOCK))])
        io.read([Read(path, 0, memory(BLOCK))])
    assert slept == pytest.approx([0.5, 1.4])


def test_files_are_opened_once_and_closed(path, monkeypatch):
    os_open, opened = os.open, []

    def counting(name, *rest):
        opened.append(os_open(name, *rest))
        return opened[-1]

    monkeypatch.setattr(os, "open", counting)
    with DiskIO() as io:
        for _ in range(3):
            io.read([Read(path, 0, memory(BLOCK))])
        assert len(opened) == 1
        io.forget(path)
        io.forget(path)
        assert closed(opened[0])
        io.read([Read(path, 0, memory(BLOCK))])
        io.write([Write(path, 0, memory(BLOCK))])
        assert len(opened) == 3 and not any(map(closed, opened[1:]))
    assert all(map(closed, opened[1:]))


def closed(fd):
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def test_idle_files_are_closed_when_many_are_open(tmp_path):
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_bytes(bytes(BLOCK))
    with DiskIO(open_files=2) as io:
        io.read([Read(path, 0, memory(BLOCK)) for path in paths])  # all in use at once
        for path in paths + paths:
            io.read([Read(path, 0, memory(BLOCK))])
        assert len(io.files) == 2


def test_closed_io_refuses(path):
    io = DiskIO()
    io.close()
    io.close()
    with pytest.raises(RuntimeError):
        io.read([Read(path, 0, memory(BLOCK))])
