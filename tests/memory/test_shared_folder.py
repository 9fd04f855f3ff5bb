"""A folder that is in use stays, in whatever process it is used; an unused one goes as a whole."""

import fcntl
import os
import subprocess
import sys

import pytest

from flexgen.memory import shared_folder
from flexgen.memory.shared_folder import remove_unused, use_folder

USER = """
import sys
from pathlib import Path
from flexgen.memory.shared_folder import use_folder
assert use_folder(Path(sys.argv[1]), make=False) is not None
print("in use", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model" / "state"
    path.mkdir(parents=True)
    (path / "file").write_text("x")
    return path


def test_a_folder_that_another_process_uses_stays_until_that_ends(folder):
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with user:
        assert user.stdout.readline() == "in use\n"
        fd = use_folder(folder, make=False)  # several may use it
        os.close(fd)
        assert not remove_unused(folder) and (folder / "file").exists()
        user.kill()
    assert remove_unused(folder) and not folder.exists()


def test_a_missing_folder_is_made_or_reported(folder):
    absent = folder.parent / "absent"
    assert use_folder(absent, make=False) is None and not remove_unused(absent)
    fd = use_folder(absent, make=True)
    assert absent.is_dir() and not remove_unused(absent)
    os.close(fd)
    assert remove_unused(absent)


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(folder, monkeypatch):
    is_at, removed = shared_folder._is_at, []

    def late(fd, path):
        if not removed:
            removed.append(path.rename(path.with_name("removed")))
        return is_at(fd, path)

    monkeypatch.setattr(shared_folder, "_is_at", late)
    fd = use_folder(folder, make=True)
    assert os.path.samestat(os.fstat(fd), folder.stat()) and not list(folder.iterdir())
    os.close(fd)


def test_a_link_and_what_another_user_owns_are_not_removed(folder, monkeypatch):
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert not remove_unused(link)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert not remove_unused(folder) and (folder / "file").exists()


def test_without_locks_a_folder_is_used_and_never_removed(folder, monkeypatch):
    def refused(*call):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)
    os.close(use_folder(folder, make=False))
    assert not remove_unused(folder) and (folder / "file").exists()
