"""Paths that are not readable files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexgen.engine.text import load_tokenizer
from flexgen.errors import CheckpointError
from flexgen.models.plain_files import check_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_files_that_can_be_read(tmp_path):
    file, empty, link = tmp_path / "a", tmp_path / "empty", tmp_path / "link"
    file.write_bytes(b"anything")
    empty.touch()
    link.symlink_to(file)
    for path in (file, empty, link):
        check_file(path)


def test_a_path_that_is_not_a_file_is_named_and_not_opened(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as raised:
            check_file(path)
        assert str(path)[:50] in str(raised.value)

    path = tmp_path / "weights"
    refused(path, "does not exist")
    path.symlink_to("../blobs/0123")
    refused(path, r"is a link to \.\./blobs/0123, which does not exist.*Download the model again")
    path.unlink()
    os.mkfifo(path)
    refused(path, "is a FIFO")
    path.unlink()
    path.mkdir()
    refused(path, "is a directory")
    path.rmdir()
    path.symlink_to(path)
    refused(path, "cannot be opened")
    path.unlink()
    path.write_bytes(POINTER)
    refused(path, "is a Git LFS pointer.*git lfs pull")
    refused(tmp_path / ("x" * 5000), "cannot be opened")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_is_a_pointer(name, tmp_path):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(tmp_path, "mine")
