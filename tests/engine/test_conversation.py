"""A text whose cache is kept: its ids are those of whole calls, and only what is new is computed."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from flexgen.engine import OptLM
from flexgen.engine.completion import Completion
from flexgen.errors import CapacityError, LaneError, RequestError
from flexgen.policy import Policy, Tier
from flexgen.runtime.choice import NewIds
from flexgen.runtime.request import Request, read_request
from flexgen.schedule.orders import ORDERS

SPLITS = st.sampled_from([{"gpu": 100}, {"cpu": 100}, {"disk": 100}])
POLICIES = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 3),
    num_gpu_batches=st.integers(1, 3),
    weights=SPLITS | st.just({"gpu": 34, "cpu": 33, "disk": 33}),
    cache=SPLITS,
    activations=SPLITS,
    attend_on=st.sampled_from(["cpu", "gpu"]),
    prefill_chunk=st.sampled_from([0, 1, 3, 5]),
    sep_layer=st.booleans(),
)
TURNS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(
    data=st.data(),
    policy=POLICIES,
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    turns=TURNS,
    seed=st.integers(0, 999),
)
def test_ids_are_those_of_whole_calls(
    data: st.DataObject,
    policy: Policy,
    device: str,
    order: str | None,
    turns: list[tuple[int, int]],
    seed: int,
    tiny: Any,
    model_names: list[str],
    prompts: Any,
) -> None:
    """Turns of new ids and answers; before some of them a part of the text is taken back."""
    model, text = tiny(data.draw(st.sampled_from(model_names))), np.empty(0, dtype=np.int64)
    with (
        OptLM(model.directory, policy, device=device, progress=False, order=order) as lm,
        lm.conversation() as chat,
    ):
        for n, (new, answer) in enumerate(turns):
            text = text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text
            text = np.concatenate([text, prompts([new], seed + n)[0]])[: 48 - answer]
            whole = model.greedy([text.tolist()], answer)[0]
            stop = data.draw(st.sampled_from([(), (int(whole[-1]),)]))
            whole = model.greedy([text.tolist()], answer, stop)[0]
            if stop:
                whole = whole[: len(text) + list(whole[len(text) :]).index(stop[0]) + 1]
            shared = min(len(chat.cached), len(text) - 1)
            shared = int(np.cumprod(chat.cached[:shared] == text[:shared]).sum())
            np.testing.assert_array_equal(chat.generate(text, answer, stop=stop), whole)
            assert chat.stats.positions_computed == len(text) - shared
            np.testing.assert_array_equal(chat.cached, whole[:-1])
            text = whole


@pytest.fixture
def lm(tiny: Any) -> Any:
    policy = Policy(weights={"cpu": 100}, cache={"disk": 100}, activations={"cpu": 100})
    with OptLM(tiny("llama gqa 2").directory, policy, device="emulated", progress=False) as model:
        yield model


def test_memory_is_taken_between_calls_planned_and_given_back(lm: Any, prompts: Any) -> None:
    (text,) = prompts([9])
    before = lm.memory_in_use()
    chat = lm.conversation()
    chat.generate(text, 4)
    held = lm.memory_in_use()
    assert all(held[tier] > before[tier] for tier in (Tier.GPU, Tier.CPU, Tier.DISK))
    alone = lm.stats.plan
    lm.generate([text], 4)
    assert lm.memory_in_use() == held, "another call leaves it as it is"
    with_chat = lm.stats.plan.on(Tier.DISK, "cache")
    again = chat.generate(text, 4, stop=())
    assert chat.stats.plan is alone
    chat.close()
    assert lm.memory_in_use() == before
    assert np.array_equal(lm.generate([text], 4, stop=())[0], again)
    assert with_chat == lm.stats.plan.on(Tier.DISK, "cache") + alone.on(Tier.DISK, "cache")
    chat.close()
    with pytest.raises(RequestError, match="closed"):
        chat.generate(text, 4)


def test_what_is_dropped_or_left_open_is_given_back(tiny: Any, prompts: Any) -> None:
    (text,) = prompts([9])
    with OptLM(
        tiny("opt").directory, device="emulated", policy=Policy(cache={"disk": 100}), progress=False
    ) as lm:
        before = lm.memory_in_use()
        chat = lm.conversation()
        chat.generate(text, 4)
        del chat
        gc.collect()
        assert lm.memory_in_use() == before
        left = lm.conversation()
        left.generate(text, 4)
        machine = lm._machine
    assert machine.in_use() == dict.fromkeys(Tier, 0)
    with pytest.raises(RequestError, match="closed"):
        left.generate(text, 4)


def test_a_text_that_outgrows_its_buffers_gets_larger_ones(tiny: Any, prompts: Any) -> None:
    model = tiny("opt")
    with (
        OptLM(model.directory, Policy(), device="cpu", progress=False) as lm,
        lm.conversation(room=1) as chat,
    ):
        text = chat.generate(prompts([6])[0], 4, stop=())  # room for 20
        more = np.concatenate([text, prompts([4], 1)[0]])
        text = chat.generate(more, 4, stop=())
        assert chat.stats.positions_computed == 5
        more = np.concatenate([text, prompts([4], 2)[0]])
        text = chat.generate(more, 4, stop=())
        assert chat.stats.positions_computed == len(more), "the whole text, once"
        np.testing.assert_array_equal(text, model.greedy([more.tolist()], 4)[0])
        more = np.concatenate([text, prompts([4], 3)[0]])
        chat.generate(more, 4, stop=())
        assert chat.stats.positions_computed == 5


def test_a_call_that_fails_leaves_a_conversation_that_can_be_used(lm: Any, tiny: Any, prompts: Any) -> None:
    model, (text,) = tiny("llama gqa 2"), prompts([9])
    with lm.conversation() as chat:
        text = chat.generate(text, 4, stop=())

        def fail(new: NewIds) -> None:
            raise ValueError("no more")

        with pytest.raises(LaneError):
            chat.generate_with(Completion(one_text(lm, text), 4, chat.sampled(stop=())), listeners=[fail])
        with pytest.raises(KeyboardInterrupt):
            chat.generate_with(Completion(one_text(lm, text), 4, chat.sampled(stop=())), check=interrupt)
        assert not len(chat.cached)
        np.testing.assert_array_equal(chat.generate(text, 4, stop=()), model.greedy([text.tolist()], 4)[0])
        with chat.stream(text[None], 6, stop=()) as stream:
            ((row, new),) = stream
        assert row == 0
        np.testing.assert_array_equal(new, model.greedy([text.tolist()], 6)[0][-6:])


def interrupt() -> None:
    raise KeyboardInterrupt


def one_text(lm: Any, text: np.ndarray) -> Request:
    return read_request(lm.spec, [text], np.ones((1, len(text))))


def test_what_is_refused(lm: Any, prompts: Any) -> None:
    with lm.conversation() as chat:
        with pytest.raises(RequestError, match="2 prompts; it takes 1"):
            chat.generate_with(Completion(read_request(lm.spec, prompts([3, 4])), 2, chat.sampled()))
        with pytest.raises(RequestError, match="room"):
            lm.conversation(room=0)
        with pytest.raises(RequestError, match="empty"):
            chat.generate([], 2)
        assert not any(lm._plans.retained), "nothing was taken"


def test_what_does_not_fit_is_refused_and_the_rest_stays(tiny: Any, prompts: Any) -> None:
    with (
        OptLM(tiny("llama gqa 2").directory, Policy(), device="emulated:memory=1MiB", progress=False) as lm,
        lm.conversation() as chat,
    ):
        text = chat.generate(prompts([20])[0], 4, stop=())
        with pytest.raises(CapacityError):
            chat.generate(np.concatenate([text, prompts([5000], 1)[0]]), 4)
        np.testing.assert_array_equal(chat.cached, text[:-1])
        chat.generate(np.concatenate([text, [5]]), 4, stop=())
        assert chat.stats.positions_computed == 2


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_text_whose_frequencies_change_is_computed_again(kind: str, prompts: Any) -> None:
    """All keys of a text that is longer than the original length are rotated by its whole length."""
    scaling: dict[str, Any] = dict(rope_type=kind, rope_theta=10_000.0, factor=2.0)
    if kind == "longrope":
        scaling |= dict(short_factor=[1.0] * 2, long_factor=[3.0] * 2, original_max_position_embeddings=16)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=48, max_position_embeddings=16, pad_token_id=1, rope_parameters=scaling,
    )  # fmt: skip
    with (
        OptLM(config, Policy(), device="cpu", weights="dummy", progress=False) as model,
        OptLM(config, Policy(prefill_chunk=4), device="cpu", weights="dummy", progress=False) as lm,
        lm.conversation() as chat,
    ):
        text = np.array(prompts([5])[0])
        for n in range(5):
            text = chat.generate(text, 4, stop=())
            whole = model.generate([text[:-4]], 4, stop=())
            np.testing.assert_array_equal(text, whole[0])
            np.testing.assert_array_equal(lm.generate([text[:-4]], 4, stop=()), whole)
            text = np.concatenate([text, prompts([2], n)[0]])
