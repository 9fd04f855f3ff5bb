"""Heads that a config calls tied and the files store: whether they are compared, and how often."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexgen.models import WeightSpec, open_model, tied_head
from flexgen.models.tensor_files import SafetensorsCheckpoint

ROWS = 64
"""The vocabulary of the tiny model."""


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, range | None]]:
    """The tensors and the rows that were read. A piece is 16 rows."""
    found: list[tuple[str, range | None]] = []
    read = SafetensorsCheckpoint.read

    def counted(
        self: SafetensorsCheckpoint, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None
    ) -> Tensor:
        found.append((weight.key, rows))
        return read(self, weight, dtype, rows)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counted)
    monkeypatch.setattr(tied_head, "_PIECE", 16 * 32 * torch.float32.itemsize)
    return found


@pytest.fixture
def stored(make_model: Any, save: Any) -> Callable[[Callable[[Tensor], None]], Path]:
    """`stored(change)`: a model whose file has the embedding and, as its head, a copy that `change` has changed."""

    def write(change: Callable[[Tensor], None] = lambda head: None) -> Path:
        directory: Path = save(make_model("llama", tie_word_embeddings=True))
        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        change(tensors["lm_head.weight"])
        save_file(tensors, directory / "model.safetensors")
        return directory

    return write


def test_equal_tensors_are_compared_in_pieces_and_only_once(stored: Any, compared: Any) -> None:
    directory = stored()
    assert open_model(directory)[0].tied_head
    pieces = [range(first, first + 16) for first in range(0, ROWS, 16)]
    assert [rows for key, rows in compared if key == "lm_head.weight"] == pieces
    assert [rows for key, rows in compared if key == "model.embed_tokens.weight"] == pieces
    compared.clear()
    assert open_model(directory)[0].tied_head
    assert compared == []


def test_a_file_that_changes_is_compared_again(stored: Any, compared: Any) -> None:
    directory = stored()
    file = directory / "model.safetensors"
    assert open_model(directory)[0].tied_head
    tensors, times = load_file(file), file.stat()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not open_model(directory)[0].tied_head


def test_the_comparison_ends_at_the_first_difference(stored: Any, compared: Any) -> None:
    def change(head: Tensor) -> None:
        head[20, 3] += 1

    assert not open_model(stored(change))[0].tied_head
    assert [rows for key, rows in compared if key == "lm_head.weight"] == [range(16), range(16, 32)]


def test_without_a_cache_the_tensors_are_compared_each_time(
    stored: Any, compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tied_head, "cache_folder", lambda kind: tmp_path / "file" / kind)
    directory = stored()
    assert open_model(directory)[0].tied_head
    assert len(compared) == 2 * ROWS // 16
    assert open_model(directory)[0].tied_head
    assert len(compared) == 4 * ROWS // 16
