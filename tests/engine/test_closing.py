"""A model that is closed gives its memory back at once."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen import OptLM, Policy


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_no_buffer_waits_for_pythons_collector(
    device: str, codec: str, tiny: Any, prompts: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    mapped: list[weakref.ref[mmap.mmap]] = []

    class Noted(mmap.mmap):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            mapped.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Noted)
    thirds = {"gpu": 34, "cpu": 33, "disk": 33}
    weights = {tier: {"percent": percent, "codec": codec} for tier, percent in thirds.items()}
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=weights, cache=thirds, activations=thirds)
    gc.collect()
    gc.disable()
    try:
        with OptLM(tiny("llama gqa 2").directory, policy, device=device, offload_dir=tmp_path) as lm:
            lm.generate(prompts([5, 9, 7, 6]), 3, stop=())
            assert any(buffer() is not None for buffer in mapped)
        assert not sum(len(buffer) for each in mapped if (buffer := each()) is not None)
    finally:
        gc.enable()
