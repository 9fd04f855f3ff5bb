"""Prompts that are computed in parts: ids and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from flexgen.engine import OptLM
from flexgen.errors import CapacityError, LaneError
from flexgen.layout.needs import MemoryPlan
from flexgen.policy import Policy, Tier
from flexgen.results.trace import Phase
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op
from flexgen.workload import Workload

SPLITS = st.sampled_from(
    [
        {"gpu": 100},
        {"cpu": 100},
        {"disk": 100},
        {"gpu": 34, "cpu": 33, "disk": 33},
        {"cpu": 50, "disk": 50},
    ]
)
POLICIES = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 4),
    num_gpu_batches=st.integers(1, 3),
    weights=SPLITS,
    cache=SPLITS,
    activations=SPLITS,
    attend_on=st.sampled_from(["cpu", "gpu"]),
    prefill_chunk=st.integers(1, 15),
    sep_layer=st.booleans(),
)


@settings(max_examples=40)
@given(
    data=st.data(),
    policy=POLICIES,
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=9),
    seed=st.integers(0, 999),
    tokens=st.integers(1, 8),
)
def test_ids_are_those_of_whole_prompts(
    data: st.DataObject,
    policy: Policy,
    device: str,
    order: str | None,
    lengths: list[int],
    seed: int,
    tokens: int,
    tiny: Any,
    model_names: list[str],
    prompts: Any,
) -> None:
    """Whatever the cut, the rows' lengths and the stops. Parts of one token, and parts that are all padding, too."""
    model, rows = tiny(data.draw(st.sampled_from(model_names))), prompts(lengths, seed)
    free = model.greedy(rows, tokens)
    made = np.unique(free[:, max(lengths) :]).tolist()
    stop = data.draw(st.lists(st.sampled_from(made), max_size=3))
    expected = model.greedy(rows, tokens, stop) if stop else free
    with OptLM(model.directory, policy, device=device, progress=False, order=order) as lm:
        np.testing.assert_array_equal(lm.generate(rows, tokens, stop=stop), expected)
        again = rows[::-1][: policy.gpu_batch_size]
        np.testing.assert_array_equal(lm.generate(again, 2, stop=()), model.greedy(again, 2))


CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    intermediate_size=256, max_position_embeddings=1024, pad_token_id=1,
)  # fmt: skip
POLICY = Policy(
    gpu_batch_size=4,
    num_gpu_batches=2,
    cache={"cpu": 50, "disk": 50},
    activations={"disk": 100},
    attend_on="gpu",
)


@pytest.fixture(scope="module")
def long_prompts(prompts: Any) -> list[list[int]]:
    return prompts([400, 390, 400, 33, 300, 7, 399, 100])


@pytest.fixture(scope="module")
def whole(long_prompts: list[list[int]]) -> tuple[np.ndarray, MemoryPlan]:
    with OptLM(CONFIG, POLICY, device="emulated", weights="dummy", progress=False) as lm:
        return lm.generate(long_prompts, 4, stop=()), lm.stats.plan


def opened(gpu_bytes: int) -> OptLM:
    limits = {Tier.GPU: gpu_bytes}
    return OptLM(CONFIG, POLICY, device="emulated", weights="dummy", progress=False, max_memory=limits)


@pytest.mark.parametrize("share", [0.6, 0.4])
def test_prompts_are_cut_where_whole_ones_do_not_fit(
    share: float, whole: tuple[np.ndarray, MemoryPlan], long_prompts: list[list[int]]
) -> None:
    ids, plan = whole
    with opened(int(share * plan.on(Tier.GPU))) as lm:
        np.testing.assert_array_equal(lm.generate(long_prompts, 4, stop=()), ids)
        chunk = lm.stats.policy.prefill_chunk
        assert 32 <= chunk < 400 and lm.policy.prefill_chunk == 0
        assert lm.stats.plan.on(Tier.GPU) <= share * plan.on(Tier.GPU)
        larger = lm._plans._plan_of(Workload(400, 4, 8))(POLICY.replace(prefill_chunk=2 * chunk))
        assert larger.on(Tier.GPU) > share * plan.on(Tier.GPU), "the largest that fits"
        assert lm._machine.device.memory.peak <= lm.stats.plan.on(Tier.GPU)
        assert {e.step.token for e in lm.stats.timing.trace.events} == set(range(1 - -(-400 // chunk), 4))
        assert lm.stats.timing.prefill < lm.stats.timing.total
        lm.generate([[5, 6, 7]], 2)
        assert lm.stats.policy.prefill_chunk == 0, "of each call"


def test_what_fits_in_no_part_is_refused_as_before(
    whole: tuple[np.ndarray, MemoryPlan], long_prompts: list[list[int]]
) -> None:
    with opened(300_000) as lm, pytest.raises(CapacityError, match="gpu tier"):
        lm.generate(long_prompts, 4)


def test_results_of_every_position_are_computed_at_once(long_prompts: list[list[int]]) -> None:
    cut = POLICY.replace(prefill_chunk=50)
    for policy in (POLICY, cut):
        with OptLM(CONFIG, policy, device="cpu", weights="dummy", progress=False) as lm:
            logits = lm.forward(long_prompts[:3])
            assert lm.stats.policy.prefill_chunk == 0
            if policy is POLICY:
                expected = logits
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=1e-5)


def test_lanes_are_timed_over_all_parts(long_prompts: list[list[int]]) -> None:
    """Each part brings the weights once more: the lane of links works longer for them."""
    policy = POLICY.replace(weights={"cpu": 100}, prefill_chunk=100)
    with OptLM(CONFIG, policy, device="emulated", weights="dummy", progress=False) as lm:
        seconds = lm.lane_seconds(long_prompts, 2)
        lm.generate(long_prompts, 2)
        loads = [e.step.token for e in lm.stats.timing.trace.events if e.step.op is Op.LOAD_WEIGHTS]
    assert set(loads) == {-3, -2, -1, 0, 1}
    assert all(seconds[phase]["compute"] > 0 and seconds[phase]["to_device"] > 0 for phase in Phase)


def test_a_step_of_a_part_that_fails_is_named(tiny: Any, prompts: Any, monkeypatch: Any) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("broken")

    with OptLM(tiny("opt").directory, Policy(prefill_chunk=3), device="cpu", progress=False) as lm:
        monkeypatch.setattr("flexgen.runtime.kvcache.attend_several", fail)
        with pytest.raises(
            LaneError, match=r"compute of a part of the prompts \(1 before the last\), layer 1"
        ):
            lm.generate(prompts([9]), 2)
