"""Models that are known by name have the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from flexgen.models import build_layers, open_model
from flexgen.models.known import KNOWN, known_name, known_repository

# In billions, as published. Those of OPT: tests/models/families/test_opt.py.
PARAMETERS = {
    "gpt-oss-20b": 20.91, "gpt-oss-120b": 116.8, "mixtral-8x7b": 46.70, "mixtral-8x22b": 140.6, "olmoe-1b-7b": 6.92,
    "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.1,
}  # fmt: skip


def test_every_name_is_tested() -> None:
    assert set(PARAMETERS) == {name for name in KNOWN if not name.startswith("opt-")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_numbers_of_parameters(name: str) -> None:
    spec, checkpoint = open_model(name, "dummy")
    assert checkpoint.directory is None and spec.dtype is torch.bfloat16
    unique = {weight.key: weight.numel for layer in build_layers(spec) for weight in layer.weights}
    assert sum(unique.values()) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.001)


def test_names_with_an_owner_and_in_capitals() -> None:
    assert known_name("Qwen/Qwen3-30B-A3B") == known_name("Qwen3-30B-A3B") == "qwen3-30b-a3b"
    assert known_name("mistralai/Mixtral-8x7B-v0.1") == "mixtral-8x7b"
    assert known_name("someone/qwen3-30b-a3b") is None and known_name("mixtral-8x8b") is None
    assert known_repository("opt-30b") == "facebook/opt-30b"
