"""What the system refuses is an error with path and fix; it leaves nothing, and the next call works."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen import OptLM, Policy
from flexgen.errors import CapacityError, CheckpointError, FlexGenError, LaneError, RequestError
from flexgen.memory import disk_store

ON_DISK = {"disk": 100}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13]] * 4

LIMITED = """
import os, resource, sys
from pathlib import Path
from flexgen import OptLM, Policy
from flexgen.errors import FlexGenError
from flexgen.memory.cpu import HostStore

model, device, offload = sys.argv[1], sys.argv[2], Path(sys.argv[3])
disk = {"disk": 100}
policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=disk, cache=disk, activations=disk)
prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13]] * 4
lm = OptLM(model, policy, device=device, offload_dir=offload / "open", progress=False)
expected = lm.generate(prompts, 6, stop=())

def generate():
    assert (lm.generate(prompts, 6, stop=()) == expected).all()

def stream():
    for row, ids in lm.stream(prompts, 6, stop=()):
        assert (expected[row, -6:] == ids).all()

def open_again():
    OptLM(model, policy, device=device, dtype="bfloat16", offload_dir=offload / "again", progress=False).close()

def map_memory():
    HostStore().allocate(1 << 32, "a test")

def lowest_free_descriptor():
    fd = os.dup(0)
    os.close(fd)
    return fd

def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

CASES = (
    (resource.RLIMIT_FSIZE, lambda: 64, generate, "CapacityError", "ulimit -f"),
    (resource.RLIMIT_FSIZE, lambda: 64, open_again, "CapacityError", "ulimit -f"),
    (resource.RLIMIT_NOFILE, lowest_free_descriptor, generate, "RequestError", "ulimit -n"),
    (resource.RLIMIT_NOFILE, lowest_free_descriptor, open_again, "CheckpointError", "ulimit -n"),
    (resource.RLIMIT_AS, address_space, generate, "CapacityError", "cpu tier"),
    (resource.RLIMIT_AS, lambda: address_space() // 2, stream, "CapacityError", "ulimit -v"),
    (resource.RLIMIT_AS, lambda: address_space() + (1 << 20), map_memory, "CapacityError", "ulimit -v"),
)
for number, (kind, limit, call, name, fix) in enumerate(CASES):
    before, raised = resource.getrlimit(kind), None
    resource.setrlimit(kind, (limit(), before[1]))
    try:
        call()
    except Exception as error:
        raised = error
    finally:
        resource.setrlimit(kind, before)
    assert isinstance(raised, FlexGenError), (number, raised)
    print(number, type(raised).__name__, fix if fix in str(raised) else raised)
    assert type(raised).__name__ == name and fix in str(raised), (number, raised)
    raised = None
    left = [path for path in offload.rglob("*") if path.is_file()]
    assert not left, (number, left)
    generate()
lm.close()
open_again()
print("done")
"""


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_limits_of_the_process(device: str, tiny: Any, tmp_path: Path) -> None:
    arguments = [str(tiny("opt").directory), device, str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and ended.stdout.endswith("done\n"), ended.stdout + ended.stderr


@pytest.fixture
def opened(tiny: Any, tmp_path: Path) -> Any:
    """A model whose cache and activations are kept in an offload directory, its path, and the right ids."""
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=ON_DISK, cache=ON_DISK, activations=ON_DISK)
    root = tmp_path / "offload"
    with OptLM(tiny("opt").directory, policy, device="emulated", offload_dir=root, progress=False) as lm:
        yield lm, root, tiny("opt").greedy(PROMPTS, 6)


def test_an_offload_directory_that_is_deleted_is_named(opened: Any) -> None:
    lm, root, expected = opened
    for _ in range(2):
        shutil.rmtree(root)
        with pytest.raises(RequestError, match=rf"offload_dir {root} cannot be used: .*create it again"):
            lm.generate(PROMPTS, 6, stop=())
        assert not root.exists()
        root.mkdir()
        np.testing.assert_array_equal(lm.generate(PROMPTS, 6, stop=()), expected)


def test_a_run_folder_that_is_deleted_is_made_again(opened: Any) -> None:
    lm, root, expected = opened
    for _ in range(2):
        np.testing.assert_array_equal(lm.generate(PROMPTS, 6, stop=()), expected)
        (run,) = root.iterdir()
        shutil.rmtree(run)
    np.testing.assert_array_equal(lm.generate(PROMPTS, 6, stop=()), expected)
    (other,) = root.iterdir()
    assert other != run, "a folder that this run has locked"


CREATING = {
    errno.EROFS: (RequestError, "give an existing offload_dir that you have permission to write to"),
    errno.EACCES: (RequestError, "give an existing offload_dir that you have permission to write to"),
    errno.EIO: (RequestError, "the disk reports a failure"),
    errno.ENOSPC: (CapacityError, "put a smaller share on disk"),
    errno.EDQUOT: (CapacityError, "put a smaller share on disk"),
    errno.EMFILE: (RequestError, "ulimit -n"),
    errno.EFBIG: (CapacityError, "ulimit -f"),
}


def refusing(root: Path, number: int, flags: int) -> Any:
    """`os.open` of a file system that refuses to open what is in `root` with any of `flags`."""
    system_open = os.open

    def refuse(path: Any, mode: int, *args: Any, **options: Any) -> int:
        if mode & flags and Path(os.fsdecode(path)).is_relative_to(root):
            raise OSError(number, os.strerror(number), str(path))
        return system_open(path, mode, *args, **options)

    return refuse


@pytest.mark.parametrize("number", CREATING, ids=errno.errorcode.get)
def test_what_refuses_new_files_is_named(
    number: int, opened: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, root, expected = opened
    error, fix = CREATING[number]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(root, number, os.O_CREAT))
        with pytest.raises(error, match=rf"{root}.*{fix}"):
            lm.generate(PROMPTS, 6, stop=())
        with pytest.raises(FlexGenError, match=rf"{root}.* cannot be written to"):
            OptLM(tiny("opt").directory, lm.policy, offload_dir=root, device="cpu", progress=False)
    assert not [path for path in root.rglob("*") if path.is_file()]
    np.testing.assert_array_equal(lm.generate(PROMPTS, 6, stop=()), expected)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_refuses_converted_weights_is_named(
    call: str, number: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=ON_DISK)

    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    def convert() -> None:
        options: Any = dict(device="cpu", dtype="bfloat16", offload_dir=tmp_path, progress=False)
        OptLM(tiny("opt").directory, policy, **options).close()

    with monkeypatch.context() as patch:
        patch.setattr(disk_store.os, call, refuse)
        error, fix = CREATING[number]
        with pytest.raises(error, match=rf"{tmp_path}.*\.safetensors.*{fix}") as raised:
            convert()
        assert "0 bytes)" not in str(raised.value).replace("0 bytes) free", "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    convert()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_disk_that_fails_while_a_call_runs_is_named(
    call: str, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, root, expected = opened

    def refuse(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(LaneError, match="at offset .*the disk reports a failure.*: '/"):
            lm.generate(PROMPTS, 6, stop=())
    assert not [path for path in root.rglob("*") if path.is_file()]
    np.testing.assert_array_equal(lm.generate(PROMPTS, 6, stop=()), expected)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_is_named(
    number: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, path_open = tiny("opt").directory, Path.open

    for name in ("config.json", "model.safetensors"):

        def refuse(path: Path, *args: Any, name: str = name, **options: Any) -> Any:
            if path.name == name:
                raise OSError(number, os.strerror(number), str(path))
            return path_open(path, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            with pytest.raises(CheckpointError, match=rf"{directory}.*{name}: cannot be read: .*; \w+"):
                OptLM(directory, device="cpu", progress=False)
