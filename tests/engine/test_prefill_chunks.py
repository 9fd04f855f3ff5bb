"""Prompts that are computed in parts: ids and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.engine import OptLM
from flexgen.policy import Policy
from flexgen.schedule.orders import ORDERS

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
