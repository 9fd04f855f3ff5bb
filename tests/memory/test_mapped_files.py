"""Parts of files that are mapped: their bytes, what the system refuses, and what the plan of memory counts."""

from __future__ import annotations

import errno
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from piece_sizes import piece_sizes
from torch import Tensor

from flexgen.errors import CheckpointError
from flexgen.memory import cpu, known_finite, mapped_files
from flexgen.memory.machine import Machine
from flexgen.memory.mapped_files import LEAST_BYTES, map_extents, prefaults
from flexgen.models.checkpoint import Extent
from flexgen.policy import Share, Split, Tier
from flexgen.units import GIB, MIB

HOST = Split(gpu=40, cpu=60)


def extent(path: Path, offset: int, count: int) -> Extent:
    return Extent(path, offset, 4 * count, torch.float32, (count,))


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, Tensor]:
    """A file of 2 MiB, and its values."""
    values = torch.arange(2 * MIB // 4, dtype=torch.float32)
    path = tmp_path / "numbers"
    path.write_bytes(values.numpy().tobytes())
    return path, values


@pytest.fixture
def maps_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny files are mapped too, and nothing is known about them."""
    monkeypatch.setattr(mapped_files, "LEAST_BYTES", 1)
    monkeypatch.setattr(known_finite, "cache_folder", lambda kind: tmp_path / "cache" / kind)


def test_extents_are_parts_of_one_mapping_of_the_file(numbers: tuple[Path, Tensor]) -> None:
    path, values = numbers
    count = LEAST_BYTES // 4
    found = map_extents({"a": extent(path, 4096 * 4 + 8, count), "b": extent(path, 4 * (len(values) - 5), 5)})
    assert torch.equal(found["a"].view(torch.float32), values[4098 : 4098 + count])
    assert torch.equal(found["b"].view(torch.float32), values[-5:])
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_writes_do_not_reach_the_file(numbers: tuple[Path, Tensor]) -> None:
    path, values = numbers
    map_extents({"a": extent(path, 0, len(values))})["a"].zero_()
    assert path.read_bytes() == values.numpy().tobytes()


def test_a_file_that_is_replaced_or_removed_keeps_its_content(
    numbers: tuple[Path, Tensor], tmp_path: Path
) -> None:
    path, values = numbers
    mapped = map_extents({"a": extent(path, 0, len(values))})["a"]
    other = tmp_path / "other"
    other.write_bytes(bytes(2 * MIB))
    other.replace(path)
    path.unlink()
    assert torch.equal(mapped.view(torch.float32), values)


def test_few_bytes_are_not_mapped(numbers: tuple[Path, Tensor]) -> None:
    path, _ = numbers
    assert map_extents({"a": extent(path, 0, LEAST_BYTES // 4 - 1)}) == {}
    assert map_extents({}) == {}


def test_a_file_that_has_become_shorter_is_reported(numbers: tuple[Path, Tensor]) -> None:
    path, values = numbers
    with path.open("r+b") as file:
        file.truncate(2 * MIB - 4096)
    with pytest.raises(
        CheckpointError, match="numbers: the file ends before byte 2097152: .* Open the model again"
    ):
        map_extents({"a": extent(path, 0, len(values))})


def test_a_file_system_without_mappings_is_left_to_copies(
    numbers: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    path, values = numbers
    monkeypatch.setattr(mapped_files.mmap, "mmap", refuse)
    assert map_extents({"a": extent(path, 0, len(values))}) == {}


def resident(mapped: Tensor) -> int:
    """Pages that page tables of this process have, from /proc/self/smaps."""
    address, found = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(f"{address:x}-"):
            found = True
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


def test_prefaults_map_every_page(numbers: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_files, "_AT_ONCE", MIB // 2)
    path, values = numbers
    mapped = map_extents({"a": extent(path, 0, len(values))})["a"]
    tasks = list(prefaults(mapped, path))
    assert len(tasks) == 4 and resident(mapped) == 0
    tasks[0]()
    assert resident(mapped) >= MIB // 2  # more if the page cache has large pages
    for task in tasks:
        task()
    assert resident(mapped) == 2 * MIB


@pytest.mark.parametrize("code", [errno.EFAULT, errno.EIO, errno.EINVAL])
def test_a_disk_that_fails_is_reported_and_an_old_kernel_is_not(
    numbers: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, values = numbers
    mapped = map_extents({"a": extent(path, 0, len(values))})["a"]
    monkeypatch.setattr(mapped_files, "_libc", lambda: SimpleNamespace(madvise=lambda *args: -1))
    monkeypatch.setattr(mapped_files.ctypes, "get_errno", lambda: code)
    (task,) = prefaults(mapped, path)
    if code == errno.EINVAL:
        task()
    else:
        with pytest.raises(CheckpointError, match="numbers: cannot be read: the disk reports an error"):
            task()


# Whole models


@pytest.fixture
def mapped_storages(monkeypatch: pytest.MonkeyPatch, maps_all: None) -> set[int]:
    """The addresses of the storages that are mappings of files."""
    storages: set[int] = set()
    map_file = mapped_files._map

    def noted(path: Path, begin: int, end: int) -> Tensor | None:
        mapped = map_file(path, begin, end)
        storages.add(mapped.untyped_storage().data_ptr() if mapped is not None else 0)
        return mapped

    monkeypatch.setattr(mapped_files, "_map", noted)
    return storages


def mapped_weights(model: Any, storages: set[int]) -> set[str]:
    homes = {w.key: model.homes[w] for layer in model.layers for w in layer.weights}
    return {
        key
        for key, home in homes.items()
        if isinstance(home, Tensor) and home.untyped_storage().data_ptr() in storages
    }


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_weights_that_the_checkpoint_has_in_their_form_are_mapped(
    stream: Callable[..., Any], saved: Callable[..., Path], mapped_storages: set[int], family: str
) -> None:
    model = stream(saved(family), HOST, "cpu", fast_start=True)
    mapped = mapped_weights(model, mapped_storages)
    assert mapped
    for layer in model.layers:
        for weight in layer.weights:
            assert torch.equal(model.homes[weight], model.checkpoint.read(weight, torch.float32))
            assert (weight.key in mapped) == (not weight.transposed)
    assert 0 < model.machine.host.cached <= model.machine.host.used
    own = {w.key: w.nbytes(torch.float32) for layer in model.layers for w in layer.weights}
    assert model.machine.host.cached == sum(own[key] for key in mapped)


@pytest.mark.parametrize(
    ("device", "split"), [("emulated", HOST), ("cpu", Split(disk=100)), ("cpu", Split(cpu=Share(100, "fp8")))]
)
def test_other_devices_tiers_and_matrices_with_a_codec_are_not(
    stream: Callable[..., Any],
    saved: Callable[..., Path],
    mapped_storages: set[int],
    device: str,
    split: Split,
) -> None:
    model = stream(saved("llama"), split, device, fast_start=True)
    mapped = mapped_weights(model, mapped_storages)
    assert all(
        model.placement.codec(w) is None for layer in model.layers for w in layer.weights if w.key in mapped
    )
    assert bool(mapped) == (split.percent(Tier.CPU) == 100)  # norms have no codec


def test_weights_are_checked_by_the_first_start_only(
    stream: Callable[..., Any],
    saved: Callable[..., Path],
    mapped_storages: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[str] = []
    check = "flexgen.memory.memory_loader.read_checked"
    monkeypatch.setattr(check, lambda extent, key, begin, out: checked.append(key))
    with piece_sizes(thread_bytes=1024):
        first = stream(saved("llama"), HOST, "cpu", fast_start=True)
        every = {w.key for layer in first.layers for w in layer.weights}
        assert set(checked) == every
        checked.clear()
        stream(saved("llama"), HOST, "cpu", fast_start=True)
        assert checked == []
        stream(saved("llama"), Split(cpu=100), "cpu", fast_start=True)
        assert checked == [], "the same weights in memory"
        stream(saved("llama"), Split(cpu=50, disk=50), "cpu", fast_start=True)
        assert set(checked) < every and checked, "others are not known"


def test_a_start_that_maps_nothing_leaves_no_note(
    stream: Callable[..., Any], saved: Callable[..., Path], mapped_storages: set[int], tmp_path: Path
) -> None:
    stream(saved("llama"), HOST, "cpu")
    assert mapped_storages == set() and not (tmp_path / "cache").exists()


def test_a_model_with_nan_is_reported_at_each_start(
    stream: Callable[..., Any], saved: Callable[..., Path], mapped_storages: set[int], tmp_path: Path
) -> None:
    directory = shutil.copytree(saved("llama"), tmp_path / "model")
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="contains NaN or infinite values"):
            stream(directory, HOST, "cpu", fast_start=True)


def test_the_free_memory_excludes_the_page_cache_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapping a file leaves the limit of the tier as it was, as a buffer of the same size does."""
    free = [10 * GIB]
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=free[0]))
    monkeypatch.setattr(cpu, "_cgroup_left", lambda: None)
    monkeypatch.setattr(cpu, "_address_space_left", lambda: None)
    machine = Machine.open("cpu")
    before = machine.limits()[Tier.CPU] or 0
    machine.host.adopt(4 * GIB, "weights of layer-0", cached=True)
    mapped = machine.limits()[Tier.CPU] or 0  # the system still counts the page cache as free
    assert abs(mapped - before) <= 0.05 * 4 * GIB + 1
    machine.close()
    assert machine.host.used == machine.host.cached == 0


def test_a_limit_of_the_address_space_counts_mappings_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * GIB))
    monkeypatch.setattr(cpu, "_cgroup_left", lambda: 6 * GIB)
    monkeypatch.setattr(cpu, "_address_space_left", lambda: 3 * GIB)
    assert cpu.available_bytes() == cpu.available_bytes(cached=2 * GIB) == 3 * GIB
    assert cpu.available_bytes(cached=5 * GIB) == GIB
    assert cpu.available_bytes(cached=7 * GIB) == 0
