"""The offload directory: scratch that goes away, published files that are complete or absent."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from flexgen.errors import MOST_OF_PATH, CapacityError, RequestError
from flexgen.memory.disk import DiskIO, Read
from flexgen.memory.disk_store import DiskStore
from flexgen.units import BLOCK


@pytest.fixture
def io():
    with DiskIO(threads=2) as io:
        yield io


@pytest.fixture
def root(tmp_path):
    return tmp_path / "offload"


@pytest.fixture
def store(root, io):
    with DiskStore(root, io) as store:
        yield store


@pytest.fixture(scope="module")
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_scratch_is_zeroed_reserved_and_counted(store, io):
    first = store.scratch("cache/layer-0", 3 * BLOCK)
    second = store.scratch("cache/layer-1", BLOCK + 1)
    assert first.stat().st_size == 3 * BLOCK and second.stat().st_size == 2 * BLOCK
    assert first.stat().st_blocks * 512 >= 3 * BLOCK
    assert (store.used, store.peak) == (5 * BLOCK, 5 * BLOCK)
    store.release(first)
    assert not first.exists()
    assert (store.used, store.peak) == (2 * BLOCK, 5 * BLOCK)
    assert store.free > 0


def test_names_never_collide_and_stay_inside(store):
    first, second = store.scratch("a", BLOCK), store.scratch("a", BLOCK)
    assert first != second and store.used == 2 * BLOCK
    store.release(first)
    store.release(first)
    assert store.used == BLOCK and second.exists()
    assert store.scratch("a", BLOCK) not in (first, second)
    for name in ("", "../a", "/tmp/a", "a/../../b"):
        with pytest.raises(ValueError, match="must stay inside"):
            store.scratch(name, BLOCK)
        with pytest.raises(ValueError, match="must stay inside"):
            store.publish(name, lambda file: None)


def test_close_removes_the_run_and_keeps_the_root(root, io):
    with DiskStore(root, io) as store:
        store.scratch("a", BLOCK)
        assert [path.name.split("-")[:3] for path in root.iterdir()] == [["flexgen", "run", str(os.getpid())]]
        store.close()
        assert list(root.iterdir()) == [] and store.used == 0
        store.scratch("a", BLOCK)  # a closed store starts over
    assert list(root.iterdir()) == []


def test_without_a_root_everything_is_temporary(tmp_path, io, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with DiskStore(None, io) as store:
        assert list(tmp_path.iterdir()) == []
        scratch = store.scratch("a", BLOCK)
        published = store.publish("b", lambda file: file.write(b"x"))
        assert scratch.parent == published.parent and scratch.parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_store_nobody_closed_is_cleaned_up_at_exit(root):
    code = (
        "import sys; from pathlib import Path; from flexgen.memory.disk import DiskIO; "
        "from flexgen.memory.disk_store import DiskStore\n"
        "store = DiskStore(Path(sys.argv[1]), DiskIO()); assert store.scratch('a', 1).exists()"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=120)
    assert list(root.iterdir()) == []


def test_what_dead_runs_left_is_removed(root, io, dead_pid):
    for folder in (f"flexgen-run-{dead_pid}-0a", f"flexgen-run-{os.getpid()}-0b", f"run-{dead_pid}-0c"):
        (root / folder / "deep").mkdir(parents=True)
        (root / folder / "deep" / "file").write_text("x")
    (root / f"flexgen-part-{dead_pid}-0d").write_text("half")
    (root / f"flexgen-part-{os.getpid()}-0e").write_text("being written")
    (root / "published").write_text("whole")
    (root / f"flexgen-run-{dead_pid}-0f").symlink_to(root / "published")
    with DiskStore(root, io):
        left = sorted(path.name for path in root.iterdir())
    # Nobody holds the locks of those with this process's id either: an earlier process had it.
    assert left == sorted([f"flexgen-run-{dead_pid}-0f", "published", f"run-{dead_pid}-0c"])


def test_a_run_of_another_process_namespace_is_kept(root, io, dead_pid):
    """Its process id means nothing here, but its folder is locked."""
    with DiskStore(root, io) as store:
        run = store.scratch("a", BLOCK).parent
        foreign = run.rename(root / f"flexgen-run-{dead_pid}-0a")
        with DiskStore(root, io):
            assert (foreign / "a-0").exists()
    with DiskStore(root, io):
        assert not foreign.exists()  # its lock ended with its run


def test_a_full_disk_is_refused_with_figures(store, root):
    with pytest.raises(CapacityError, match=rf"a-0: needs .*{1 << 60} bytes.*the disk has .*bytes\) free"):
        store.scratch("a", 1 << 60)
    assert store.used == 0 and not list(root.rglob("a*"))


def test_a_disk_that_fills_while_reserving(store, root, monkeypatch):
    def full(*call):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="put a smaller share on disk"):
        store.scratch("a", BLOCK)
    assert store.used == 0 and not list(root.rglob("a*"))


def test_an_interrupt_while_reserving_leaves_no_file(store, root, monkeypatch):
    def interrupted(*call):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.scratch("a", BLOCK)
    assert store.used == 0 and not list(root.rglob("a*"))
    assert store.scratch("a", BLOCK).exists()


def test_an_interrupt_of_a_release_leaves_no_file(store, io, monkeypatch):
    def interrupted(*call):
        raise KeyboardInterrupt

    path = store.scratch("a", BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(io, "forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.release(path)
    assert store.used == 0 and not path.exists()


def test_a_scratch_file_that_somebody_removed(store):
    path = store.scratch("a", BLOCK)
    path.unlink()
    store.release(path)
    assert store.used == 0


def test_file_systems_that_cannot_reserve(store, monkeypatch):
    def unsupported(*call):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert store.scratch("a", BLOCK).stat().st_size == BLOCK
    assert store.scratch("empty", 0).stat().st_size == 0


def test_published_files_outlive_the_run(root, io):
    with DiskStore(root, io) as store:
        path = store.publish("opt/int4.safetensors", lambda file: file.write(b"whole"))
    assert path == root / "opt" / "int4.safetensors"
    with DiskStore(root, io) as store:
        assert store.published("opt/int4.safetensors") == path
        assert store.published("opt") is None and store.published("absent") is None
        assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_failed_publish_leaves_nothing(store, root, error):
    def write(file):
        file.write(b"half")
        raise error

    store.publish("kept", lambda file: file.write(b"old"))
    for name in ("new", "kept"):
        with pytest.raises(type(error)):
            store.publish(name, write)
    assert [path.name for path in root.iterdir()] == ["kept"]
    assert (root / "kept").read_bytes() == b"old"


def test_a_republished_file_is_read_again(store, io):
    target = torch.zeros(2 * BLOCK, dtype=torch.uint8)
    target = target[-target.data_ptr() % BLOCK :][:BLOCK]
    for byte in (1, 2):
        path = store.publish("a", lambda file, byte=byte: file.write(bytes([byte]) * BLOCK))
        io.read([Read(path, 0, target)])
        assert target.eq(byte).all()


def test_a_root_that_cannot_be_made_is_refused_with_its_name(tmp_path, io):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match=f"offload_dir {root} cannot be written to"):
            DiskStore(root, io)


def test_free_space_of_a_removed_root_is_refused_with_its_name(store, root):
    root.rmdir()
    for ask in (lambda: store.free, lambda: store.total):
        with pytest.raises(RequestError, match=f"offload_dir {root} cannot be used: No such file"):
            ask()
    with pytest.raises(RequestError, match=f"{root} cannot be written: No such file.*open the model again"):
        store.scratch("a", BLOCK)


def test_a_directory_longer_than_a_path_is_not_shown_whole():
    with DiskIO() as io, pytest.raises(RequestError, match="cannot be written to") as raised:
        DiskStore(Path("x" * 100_000), io)
    assert len(str(raised.value)) < 2 * MOST_OF_PATH
