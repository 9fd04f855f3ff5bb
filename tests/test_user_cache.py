"""Where the user's cache is, and how its files are written."""

import os

import pytest

from flexgen.user_cache import cache_folder, keep


def test_a_relative_folder_in_the_environment_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("hardware") == tmp_path / ".cache" / "flexgen" / "hardware"


def test_the_environment_sets_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("specs") == tmp_path / "flexgen" / "specs"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "file"
    keep(path, b"first")
    keep(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_no_part(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        keep(tmp_path / "file", b"data")
    assert os.listdir(tmp_path) == []
