"""A prefix that all prompts share: it is computed once, and the ids are those of prompts that are computed whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from piece_sizes import piece_sizes
from tiny_families import TINY, random_model
from transformers import AutoConfig

from flexgen.engine import OptLM
from flexgen.policy import Policy, Tier
from flexgen.schedule.orders import ORDERS

OPT, LLAMA, WINDOW = "opt", "llama gqa 2", "gemma2, every other layer with a window"
OTHERS = {"ALiBi": "bloom", "sinks": "gpt_oss", "windows in chunks": "llama4_text"}
FAMILIES = [OPT, LLAMA, WINDOW, *OTHERS]
PREFIX, TOKENS = 33, 8
OWN = [3, 7, 1, 5, 4, 2, 7]
"""The lengths of what the prompts do not share. With 48 positions of the tiny models, they are 7 at most."""
PLACES = [("cpu", "cpu"), ("emulated", "cpu"), ("emulated", "gpu")]
"""Devices, and what attends to cache that is not on the device. A CPU attends to all of it."""
ON_GPU = [pytest.param("cuda", attend_on, marks=pytest.mark.gpu) for attend_on in ("cpu", "gpu")]
THIRDS = {"gpu": 34, "cpu": 33, "disk": 33}


def sharing(own: Sequence[int], length: int = PREFIX, seed: int = 0) -> list[list[int]]:
    """Prompts that begin with `length` equal ids, and differ in the next one."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(2, 60, length).tolist()
    return [[*prefix, 2 + n, *rng.integers(2, 60, more - 1).tolist()] for n, more in enumerate(own)]


@pytest.fixture(scope="module")
def family(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a tiny model of a family."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in OTHERS:
            return Path(tiny(name).directory)
        if name not in made:
            config = AutoConfig.for_model(OTHERS[name], **TINY[OTHERS[name]][0])
            made[name] = tmp_path_factory.mktemp("family")
            random_model(config).save_pretrained(made[name])
        return made[name]

    return directory


@pytest.fixture(scope="module")
def whole(family: Any, without_sharing: Any) -> Any:
    return lambda name, rows, stop=(): without_sharing(family(name), rows, TOKENS, stop)


def shared(lm: OptLM, rows: list[list[int]], stop: Sequence[int] = (), length: int = PREFIX) -> np.ndarray:
    """The ids of a call that computes `length` tokens once, and then frees all that it has taken."""
    before = lm.memory_in_use()
    out = lm.generate(rows, TOKENS, stop=stop)
    assert lm.stats is not None and lm.stats.prefix == length
    assert lm.memory_in_use() == before
    return out


@pytest.mark.parametrize("cache", [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, THIRDS], ids=str)
@pytest.mark.parametrize(("device", "attend_on"), [*PLACES, *ON_GPU])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_whole_prompts(
    name: str, device: str, attend_on: str, cache: dict[str, float], family: Any, whole: Any, mixed: Any
) -> None:
    rows = sharing(OWN)
    policy = mixed(cache=cache, attend_on=attend_on)
    with OptLM(family(name), policy, device=device, dtype="float32", progress=False) as lm:
        np.testing.assert_array_equal(shared(lm, rows), whole(name, rows))


@pytest.mark.parametrize(("device", "attend_on"), PLACES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order: str, device: str, attend_on: str, family: Any, whole: Any, mixed: Any) -> None:
    rows = sharing(OWN)
    policy = mixed(cache={"cpu": 60, "disk": 40}, attend_on=attend_on, sep_layer=False)
    with OptLM(family(LLAMA), policy, device=device, order=order, progress=False) as lm:
        np.testing.assert_array_equal(shared(lm, rows), whole(LLAMA, rows))


@pytest.mark.parametrize("chunk", [2, 5, 33])
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("name", [LLAMA, WINDOW, "ALiBi"])
def test_prompts_in_parts(name: str, attend_on: str, chunk: int, family: Any, whole: Any, mixed: Any) -> None:
    """The prefix and the prompts after it are computed in parts."""
    rows = sharing(OWN)
    policy = mixed(prefill_chunk=chunk, attend_on=attend_on)
    with OptLM(family(name), policy, device="emulated", dtype="float32", progress=False) as lm:
        np.testing.assert_array_equal(shared(lm, rows), whole(name, rows))


@pytest.mark.parametrize("page_tokens", [4, 33, 64])
def test_pages_of_any_size(page_tokens: int, family: Any, whole: Any, mixed: Any) -> None:
    """Several pages, a last one that is full, and one that is not."""
    rows = sharing(OWN)
    for cache in ({"cpu": 100}, {"disk": 100}):
        with (
            piece_sizes(page_tokens=page_tokens, memory_page_tokens=page_tokens),
            OptLM(family(WINDOW), mixed(cache=cache), device="emulated", progress=False) as lm,
        ):
            np.testing.assert_array_equal(shared(lm, rows), whole(WINDOW, rows))


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("cache", [{"cpu": 100}, THIRDS], ids=str)
def test_rows_that_stop_leave(cache: dict[str, float], device: str, family: Any, whole: Any) -> None:
    """Stops at many tokens, so that the cache of the other rows moves, several times."""
    rows = sharing([3, 7, 1, 5, 4, 2, 7, 6, 3, 2, 5, 1], seed=1)
    free = whole(LLAMA, rows)[:, -TOKENS:]
    stop = np.unique(free[:, 1::3])[::3].tolist()
    ended = np.isin(free, stop)
    assert len(set(np.argmax(ended, axis=1)[ended.any(axis=1)])) > 2
    policy = Policy(gpu_batch_size=3, num_gpu_batches=4, cache=cache)
    with OptLM(family(LLAMA), policy, device=device, progress=False) as lm:
        np.testing.assert_array_equal(shared(lm, rows, stop), whole(LLAMA, rows, stop))


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_prefix_that_is_all_but_one_id(device: str, family: Any, whole: Any, mixed: Any) -> None:
    short = [*sharing([1] * 3), sharing([4])[0][:PREFIX] + [50, 51, 52, 53]]
    equal = [sharing([5])[0]] * 4
    with OptLM(family(LLAMA), mixed(), device=device, progress=False) as lm:
        np.testing.assert_array_equal(shared(lm, short), whole(LLAMA, short))
        np.testing.assert_array_equal(shared(lm, equal, length=PREFIX + 4), whole(LLAMA, equal))


def test_prompts_that_share_nothing(tiny: Any, mixed: Any) -> None:
    """One prompt, few common ids, and models whose keys depend on the length of the batch's longest row."""
    with OptLM(tiny(LLAMA).directory, mixed(), progress=False) as lm:
        for rows in (sharing([5]), sharing(OWN, 31), [[5, 6], [7]]):
            lm.generate(rows, 2, stop=())
            assert lm.stats is not None and lm.stats.prefix == 0
    with OptLM(tiny(LLAMA).directory, mixed(attn_sparsity=0.5), progress=False) as lm:
        lm.generate(sharing(OWN), 2, stop=())
        assert lm.stats is not None and lm.stats.prefix == 0


def test_keys_that_depend_on_the_length_are_not_shared(mixed: Any) -> None:
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0, original_max_position_embeddings=44)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=44, rope_parameters=rope,
    )  # fmt: skip
    with OptLM(config, mixed(), weights="dummy", progress=False) as lm:
        for own, length in (([3, 4, 2], PREFIX), ([3, 9, 2], 0)):
            lm.generate(sharing(own), 4, stop=())
            assert lm.stats is not None and lm.stats.prefix == length


def test_streams_texts_and_samples(tiny: Any, mixed: Any) -> None:
    rows, found = sharing(OWN), []
    for share in (True, False):
        policy = mixed(share_prefix=share)
        with OptLM(tiny(LLAMA).directory, policy, dtype="float32", progress=False) as lm:
            streamed = dict(lm.stream(rows, TOKENS, stop=()))
            drawn = lm.generate(rows, TOKENS, do_sample=True, seed=3, stop=())
            assert lm.stats is not None and lm.stats.prefix == PREFIX * share
            found.append((np.stack([streamed[n] for n in range(len(rows))]), drawn))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize(("device", "attend_on"), PLACES)
@pytest.mark.parametrize("cache", [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, THIRDS], ids=str)
def test_a_call_takes_at_most_what_was_planned(
    cache: dict[str, float], device: str, attend_on: str, chunk: int, tiny: Any, mixed: Any
) -> None:
    policy = mixed(cache=cache, attend_on=attend_on, prefill_chunk=chunk)
    with OptLM(tiny(WINDOW).directory, policy, device=device, progress=False) as lm:
        lm.generate(sharing(OWN), TOKENS, stop=())
        assert lm.stats is not None and lm.stats.prefix == PREFIX
        plan, machine = lm.stats.plan, lm._machine
        fixed = {
            tier: sum(n.nbytes for n in plan.needs if n.tier is tier and n.role != "workspace")
            for tier in Tier
        }
        ids, rounded = 8 * 1024, 96 * 1024
        assert -ids < fixed[Tier.CPU] - machine.host.peak < rounded
        assert machine.disk.peak <= fixed[Tier.DISK] - plan.on(Tier.DISK, "weights")
        if device == "emulated":
            assert 0 <= fixed[Tier.GPU] - machine.device.memory.peak < rounded


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_scores_and_logits_of_all_positions(device: str, tiny: Any, mixed: Any) -> None:
    """Those of the prefix are computed once, and returned for every prompt."""
    rows, found = sharing(OWN), []
    for share in (True, False):
        policy = mixed(share_prefix=share)
        with OptLM(tiny(LLAMA).directory, policy, device=device, dtype="float32", progress=False) as lm:
            logits, scores = lm.forward(rows), lm.score(rows)
            assert lm.stats is not None and lm.stats.prefix == PREFIX * share
            found.append((logits, scores))
    (logits, scores), (others, theirs) = found
    torch.testing.assert_close(logits, others, rtol=0, atol=2e-5)
    for one, other in zip(scores, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_the_report_has_the_prefix(tiny: Any, mixed: Any) -> None:
    rows = sharing(OWN)
    with OptLM(tiny(LLAMA).directory, mixed(), device="emulated", progress=False) as lm:
        _, report = lm.generate(rows, TOKENS, stop=(), stats=True)
        assert report.prefix == PREFIX and report.to_dict()["prefix"] == PREFIX
        assert f"prefix       {PREFIX} tokens, computed once for {len(rows)} prompts" in report.card()
        assert report.prompt_tokens == sum(map(len, rows))
        lanes = lm.lane_seconds(rows, TOKENS)
        assert all(seconds > 0 for phase in lanes.values() for seconds in phase.values())
