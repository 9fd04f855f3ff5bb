"""A model that is closed gives its memory back at once."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen import OptLM, Policy
from flexgen.engine.completion import Completion
from flexgen.errors import LaneError, RequestError
from flexgen.models.embed import Head
from flexgen.policy import Tier
from flexgen.runtime.request import read_request

PATIENCE = 60.0


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


@pytest.mark.parametrize("device", ["cpu", "emulated:link=256KiB,disk=256KiB"])
def test_closing_ends_a_call_in_another_thread(
    device: str, tiny: Any, prompts: Any, mixed: Any, threads: Any, tmp_path: Path
) -> None:
    before, begun, raised = threads(), threading.Event(), list[BaseException]()
    lm = OptLM(tiny("opt").directory, mixed(), device=device, offload_dir=tmp_path, progress=False)
    request, closing = read_request(lm.spec, prompts([5, 9, 7, 6])), threading.Event()

    def listen(new: Any) -> None:
        begun.set()
        assert closing.wait(PATIENCE)

    def call() -> None:
        try:
            lm.generate_with(Completion(request, 30, lm.sampled(stop=())), listeners=[listen])
        except BaseException as error:
            raised.append(error)

    def close() -> None:
        closing.set()
        lm.close()

    caller, closer = (threading.Thread(target=run, daemon=True) for run in (call, close))
    caller.start()
    assert begun.wait(PATIENCE)
    closer.start()
    for thread in (closer, caller):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert isinstance(raised[0], RequestError) and "closed by another thread" in str(raised[0])
    assert threads() <= before and not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="open it again"):
        lm.generate(prompts([5]), 2)
    lm.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_call_cannot_close_its_own_model(device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    given = prompts([5, 9, 7, 6])
    with OptLM(tiny("opt").directory, mixed(), device=device, progress=False) as lm:
        expected = lm.generate(given, 3, stop=())
        request, choice = read_request(lm.spec, given), lm.sampled(stop=())
        with pytest.raises(LaneError, match="from within a call"):
            lm.generate_with(Completion(request, 3, choice), listeners=[lambda new: lm.close()])
        np.testing.assert_array_equal(lm.generate(given, 3, stop=()), expected)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_memory_in_use_is_that_of_the_weights_between_calls(
    device: str, tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Head.forward
    during: list[dict[Tier, int]] = []
    with OptLM(tiny("opt").directory, mixed(), device=device, progress=False) as lm:
        opened = lm.memory_in_use()
        monkeypatch.setattr(
            Head, "forward", lambda *args: during.append(lm.memory_in_use()) or forward(*args)
        )
        lm.generate(prompts([3, 5, 4]), 3, stop=())
        assert lm.memory_in_use() == opened
        assert (opened[Tier.GPU] > 0) is (device == "emulated") and opened[Tier.CPU] > opened[Tier.DISK] == 0
    assert during and all(now[tier] > opened[tier] for now in during for tier in (Tier.CPU, Tier.DISK))
