"""Threads that fill buffers with weights: all pieces, the first failure, and what they leave behind."""

from __future__ import annotations

import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from piece_sizes import piece_sizes

from flexgen.errors import CheckpointError
from flexgen.memory.parallel_reading import Workers, read_checked, staging
from flexgen.models.checkpoint import Extent
from flexgen.models.headers import read_header
from flexgen.policy import Share, Split

WIDE = dict(hidden_size=128, ffn_dim=192, word_embed_proj_dim=128)  # whole groups


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_all_tasks_run_on_as_many_threads_as_torch_uses(three_threads: None) -> None:
    together, seen = threading.Barrier(3, timeout=60), []

    def task(number: int) -> None:
        together.wait()
        seen.append((number, torch.get_num_threads()))

    before = threading.active_count()
    with Workers() as workers:
        workers.run(partial(task, number) for number in range(6))
    assert sorted(seen) == [(number, 1) for number in range(6)], "one thread for the operations of each"
    assert threading.active_count() == before
    assert torch.get_num_threads() == 3


def test_no_thread_starts_without_a_task() -> None:
    before = threading.active_count()
    with Workers() as workers:
        workers.run([])
        assert threading.active_count() == before


def test_the_first_failure_is_raised_and_later_tasks_do_not_run() -> None:
    ran: list[int] = []

    def task(number: int) -> None:
        ran.append(number)
        if number == 2:
            raise CheckpointError("the disk is gone")

    with Workers() as workers:
        workers.count = 1
        with pytest.raises(CheckpointError, match="the disk is gone"):
            workers.run(partial(task, number) for number in range(10_000))
        assert ran == [0, 1, 2]
        workers.run([partial(ran.append, -1)])
    assert ran[-1] == -1


def test_each_thread_reuses_its_own_buffer() -> None:
    addresses: list[list[int]] = []
    together = threading.Barrier(2, timeout=60)

    def task() -> None:
        together.wait()
        addresses.append([staging(nbytes).data_ptr() for nbytes in (4096, 100, 4096)])

    with Workers() as workers:
        workers.count = 2
        workers.run([task, task])
    assert all(len(set(each)) == 1 for each in addresses)
    assert addresses[0] != addresses[1]


@pytest.mark.parametrize(("begin", "rows"), [(0, 6), (32, 3)])
def test_a_piece_is_read_from_the_place_of_its_weight(begin: int, rows: int, tmp_path: Path) -> None:
    values = torch.arange(48, dtype=torch.float32).view(6, 8) + 1
    path = tmp_path / "weights"
    path.write_bytes(bytes(64) + values.numpy().tobytes())
    extent = Extent(path, 64, values.nbytes, torch.float32, (6, 8))
    out = torch.zeros(rows * 32, dtype=torch.uint8)
    read_checked(extent, "a", begin, out)
    assert torch.equal(out.view(torch.float32).view(rows, 8), values[begin // 32 : begin // 32 + rows])


def test_a_file_that_is_too_short_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    extent = Extent(path, 0, 128, torch.float32, (32,))
    with pytest.raises(CheckpointError, match="weights: the file ends within a: .* Open the model again"):
        read_checked(extent, "a", 64, torch.empty(64, dtype=torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_a_value_that_is_not_finite_is_reported_by_the_name_of_its_weight(
    value: float, codec: str, stream: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(saved("opt", **WIDE), tmp_path / "model")
    path = directory / "model.safetensors"
    name = "model.decoder.layers.1.fc2.weight"
    last = read_header(path)[name]
    with path.open("r+b") as file:
        file.seek(last.offset + last.nbytes - 4)
        file.write(struct.pack("<f", value))
    found = pytest.raises(CheckpointError, match=f"{name} contains NaN or infinite values")
    with piece_sizes(thread_bytes=256), found:
        stream(directory, Split(cpu=Share(100, codec)))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("open")]
