"""What crashed runs left is removed; what others put next to it delays nobody."""

import fcntl
import os
import subprocess
import sys

import pytest

from flexgen.memory import run_folder
from flexgen.memory.run_folder import RunFolder, make_partial, remove_abandoned

LARGEST_PID = 4_194_303


@pytest.mark.parametrize("kind", ["run", "part"])
def test_a_fifo_of_such_a_name_is_not_opened(tmp_path, kind):
    path = tmp_path / f"flexgen-{kind}-{LARGEST_PID}-x"
    os.mkfifo(path)
    code = (
        "import sys; from pathlib import Path; from flexgen.memory.run_folder import remove_abandoned\n"
        "remove_abandoned(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert path.exists()


def test_what_another_user_owns_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / f"flexgen-run-{LARGEST_PID}-x"
    path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        remove_abandoned(tmp_path)
        assert path.exists()
    remove_abandoned(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("locks", [True, False])
def test_the_process_id_decides_only_where_there_are_no_locks(tmp_path, monkeypatch, locks):
    path = tmp_path / f"flexgen-run-{os.getpid()}-x"
    path.mkdir()
    if not locks:

        def refused(*call):
            raise OSError("no locks here")

        monkeypatch.setattr(fcntl, "flock", refused)
    remove_abandoned(tmp_path)
    assert path.exists() is not locks


def test_what_a_run_has_locked_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    fd, partial = make_partial(tmp_path)
    remove_abandoned(tmp_path)
    assert run.path.exists() and partial.exists()
    os.close(fd)
    remove_abandoned(tmp_path)
    assert not partial.exists()
    run.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = run_folder._lock, []

    def late(fd, path):
        if len(removed) < 2:
            remove_abandoned(tmp_path)
            removed.append(path)
        return lock(fd, path)

    monkeypatch.setattr(run_folder, "_lock", late)
    run = RunFolder(tmp_path)
    fd, partial = make_partial(tmp_path)
    removed_first, _ = removed
    assert run.path.exists() and partial.exists() and not removed_first.exists()
    os.close(fd)
    run.remove()
