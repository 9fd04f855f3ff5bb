"""NaN and infinite values in weights that are used from their files are found when they are first read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexgen.errors import CheckpointError, LaneError
from flexgen.memory import first_read
from flexgen.memory.first_read import CheckedRanges, Part, check_finite
from flexgen.policy import Split

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DISK = Split(disk=100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, first_read._PIECE - 1, first_read._PIECE, first_read._PIECE + 1])
def test_only_values_that_are_not_finite_are_refused(dtype: torch.dtype, count: int) -> None:
    info = torch.finfo(dtype)
    extremes = torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0, info.smallest_normal / 4], dtype=dtype)
    values = extremes.repeat(count // 6 + 1)[:count].clone()
    check_finite(values.view(torch.uint8), dtype, Path("a"), "b")
    for number in (float("nan"), float("inf"), -float("inf")):
        if count:
            values[-1] = number
            with pytest.raises(CheckpointError, match="^a: b contains NaN or infinite values"):
                check_finite(values.view(torch.uint8), dtype, Path("a"), "b")


def damaged(saved: Any, directory: Path, name: str, number: float) -> Path:
    """A copy of a checkpoint with one value of one tensor changed."""
    shutil.copytree(saved("opt"), directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name].flatten()[-1] = number
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("number", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.1.fc2.weight", "layers.1.self_attn.k_proj.bias"])
def test_a_value_that_is_not_finite_is_found_with_its_tensor(
    stream: Any, saved: Any, tmp_path: Path, device: str, number: float, name: str
) -> None:
    (key,) = (key for key in load_file(saved("opt") / "model.safetensors") if key.endswith(name))
    directory = damaged(saved, tmp_path / "model", key, number)
    with stream(directory, DISK, device) as model:
        refused = 0
        for layer in range(len(model.layers)):
            if any(weight.key in key for weight in model.layers[layer].weights):
                refused += 1
                for slot in (0, 1):  # each time that it is asked for
                    with pytest.raises(
                        LaneError, match=f"model.safetensors: .*{name} contains NaN or infinite values"
                    ):
                        model.bring(layer, slot)
            else:
                model.bring(layer, 0)
        assert refused == 1


def part(begin: int, end: int, key: str = "a") -> Part:
    return Part(key, Path("file"), begin, torch.empty(end - begin, dtype=torch.uint8), torch.bfloat16)


def test_a_range_is_checked_if_its_pieces_were() -> None:
    checked = CheckedRanges()
    for begin, end in ((0, 10), (20, 30), (10, 20)):
        checked.add(part(begin, end))
    for begin, end in ((0, 30), (5, 25), (29, 30)):
        assert part(begin, end) in checked
    for begin, end in ((0, 31), (30, 31), (40, 50)):
        assert part(begin, end) not in checked
    assert part(0, 30, "b") not in checked
    checked.add(part(40, 50))
    assert part(0, 50) not in checked and part(45, 50) in checked


def test_values_are_checked_once(stream: Any, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = first_read.check_finite

    def count(data: Any, dtype: Any, path: Any, key: str) -> None:
        checked.append(key)
        check(data, dtype, path, key)

    monkeypatch.setattr(first_read, "check_finite", count)
    with stream(saved("opt"), DISK, "emulated") as model:
        for _ in range(3):
            for slot in (0, 1):
                model.bring(1, slot)
        assert sorted(checked) == sorted(weight.key for weight in model.layers[1].weights)


def test_values_are_not_checked_again_in_other_pieces(
    stream: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(first_read, "check_finite", lambda data, dtype, path, key: checked.append(key))
    with stream(saved("opt"), DISK, "emulated") as model:
        model.bring(1, 0)
        once = len(checked)
        model.bring(1, 0, pieces=3)
        assert len(checked) == once > 0
