"""What a user can do about an error of a file fits the file: one of the offload directory, or of a checkpoint."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flexgen.memory.direct_file import DirectFile, fix_for

ERRORS = [errno.EIO, errno.ENOENT, errno.EACCES, errno.EROFS, errno.EMFILE]


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_file_that_is_only_read_needs_no_other_offload_dir(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert "offload_dir" not in fix_for(error, writable=False)
    assert fix_for(error) == fix_for(error, writable=True)


@pytest.mark.parametrize(
    ("writable", "fix"), [(False, "copy or download the file again"), (True, "offload_dir")]
)
def test_a_failing_disk_names_the_fix_of_the_file(
    writable: bool, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    file = DirectFile(path, writable, direct=False)
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(
        OSError, match=f"the disk reports a failure: read the system log, and .*{fix}"
    ) as caught:
        file.read(memoryview(bytearray(4096)), 0)
    assert ("offload_dir" in str(caught.value)) == writable
    file.close()


def test_a_file_that_is_missing_names_its_fix(tmp_path: Path) -> None:
    for writable, fix in ((False, "copy or download it again"), (True, "open the model again")):
        with pytest.raises(FileNotFoundError, match=fix):
            DirectFile(tmp_path / "missing", writable, direct=True)
