"""Layers with a window: ids with a ring of pages are those with all pages, and the ring takes what is planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from piece_sizes import piece_sizes

from flexgen.engine import OptLM
from flexgen.errors import PolicyError
from flexgen.layout.cache import cache_segments
from flexgen.policy import Policy, Tier
from flexgen.schedule.orders import ORDERS

GEMMA, MISTRAL = "gemma2, every other layer with a window", "mistral with a window"
LENGTHS = [3, 7, 5, 9, 2, 6, 4, 8]
TOKENS = 24
"""With prompts of up to 9, several times the window of 5 and the ring of 8 or 16 tokens."""


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_far_beyond_the_window(
    order: str, device: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    model, rows = tiny(GEMMA), prompts(LENGTHS)
    with OptLM(model.directory, mixed(), device=device, order=order, progress=False) as lm:
        out = lm.generate(rows, TOKENS, stop=())
    np.testing.assert_array_equal(out, model.greedy(rows, TOKENS))


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("name", [GEMMA, MISTRAL])
def test_a_ring_gives_the_ids_of_the_whole_cache(
    name: str, device: str, attend_on: str, codec: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    cache = {
        tier: dict(percent=percent, codec=codec) for tier, percent in dict(gpu=34, cpu=33, disk=33).items()
    }
    policy, rows, ids = mixed(cache=cache, attend_on=attend_on), prompts(LENGTHS), []
    for page_tokens, ring in ((4, True), (64, False)):
        with (
            piece_sizes(page_tokens=page_tokens, memory_page_tokens=page_tokens),
            OptLM(tiny(name).directory, policy, device=device, progress=False) as lm,
        ):
            ids.append(lm.generate(rows, TOKENS, stop=()))
            shape, topology = lm.spec.layers[0].attention.cache, lm._machine.device.topology
            segments = cache_segments(shape, policy, 3, 9 + TOKENS, lm.dtype, topology)
            assert [segment.window is not None for segment in segments] == [ring] * 3
    np.testing.assert_array_equal(*ids)


@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_a_call_takes_what_was_planned(
    chunk: int, device: str, attend_on: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    policy = mixed(gpu_batch_size=12, attend_on=attend_on, prefill_chunk=chunk)
    """The peaks of all stores are what the plan says, but for ids and for what is rounded up to whole blocks."""
    with OptLM(tiny(GEMMA).directory, policy, device=device, progress=False) as lm:
        lm.generate(prompts([20] * 18), 6, stop=())
        plan, machine = lm.stats.plan, lm._machine
        fixed = {
            tier: sum(n.nbytes for n in plan.needs if n.tier is tier and n.role != "workspace")
            for tier in Tier
        }
        rounded, ids = 64 * 1024, 4 * 1024
        assert -ids < fixed[Tier.CPU] - machine.host.peak < rounded
        assert machine.disk.peak == fixed[Tier.DISK] - plan.on(Tier.DISK, "weights") > 0
        if device == "emulated":
            assert 0 <= fixed[Tier.GPU] - machine.device.memory.peak < rounded


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_conversation_continues_or_starts_again(device: str, tiny: Any) -> None:
    """A text that goes back by more than the ring has is computed from its first token."""
    model = tiny(MISTRAL)
    text = list(range(2, 22))
    policy = Policy(cache={"cpu": 100}, gpu_batch_size=1)
    with OptLM(model.directory, policy, device=device, progress=False) as lm, lm.conversation() as talk:
        for given in (text[:12], text, text[:19] + [30, 31], text[:9] + [40], text[:9] + [40, 41, 42]):
            out = talk.generate(given, 9, stop=())
            np.testing.assert_array_equal(out, model.greedy([given], 9)[0])


@pytest.mark.parametrize("codec", ["none", "int4", "fp8"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_conversation_with_a_ring_says_what_one_with_all_pages_says(
    device: str, codec: str, tiny: Any
) -> None:
    """Turns of text and answers, until the text is several times as long as the ring of 8 tokens."""
    said = []
    policy = Policy(cache={"cpu": {"percent": 100, "codec": codec}}, gpu_batch_size=1)
    for page_tokens in (4, 64):
        with (
            piece_sizes(page_tokens=page_tokens, memory_page_tokens=page_tokens),
            OptLM(tiny(MISTRAL).directory, policy, device=device, progress=False) as lm,
            lm.conversation() as talk,
        ):
            text: list[int] = []
            for new in ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]):
                text = talk.generate([*text, *new], 7, stop=()).tolist()
            said.append(text)
    assert said[0] == said[1] and len(said[0]) == 13 + 4 * 7


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("name", [GEMMA, MISTRAL])
def test_a_stream_has_the_ids_of_a_call(name: str, device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    """Rows end at different tokens, so that rings move to other batches."""
    model, rows = tiny(name), prompts(LENGTHS)
    whole, width = model.greedy(rows, TOKENS), max(LENGTHS)
    stops = {int(row[width + 7 + n]) for n, row in enumerate(whole[:3])}
    with OptLM(model.directory, mixed(), device=device, progress=False) as lm:
        found = dict(lm.stream(rows, TOKENS, stop=sorted(stops)))
    for number, row in enumerate(whole[:, width:].tolist()):
        ends = next((n for n, token in enumerate(row) if token in stops), TOKENS - 1)
        assert found[number].tolist() == row[: ends + 1]


def test_sparse_attention_is_dense_in_layers_with_a_window(tiny: Any, prompts: Any, mixed: Any) -> None:
    model, rows = tiny(MISTRAL), prompts(LENGTHS)
    for device in ("cpu", "emulated"):
        with OptLM(model.directory, mixed(attn_sparsity=0.1), device=device, progress=False) as lm:
            np.testing.assert_array_equal(lm.generate(rows, 12, stop=()), model.greedy(rows, 12))


def test_sparse_attention_of_scores_with_a_cap_is_refused_by_name(tiny: Any, mixed: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"attn_sparsity = 0.1 is not supported for .*, whose attention has a cap"
    ):
        OptLM(tiny(GEMMA).directory, mixed(attn_sparsity=0.1), progress=False)
