"""Whatever the model, policy, device, order, prompts and stops: ids and logits are transformers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.engine.model import OptLM
from flexgen.policy import Policy
from flexgen.schedule.orders import ORDERS

SPLITS = st.sampled_from(
    [
        {"gpu": 100},
        {"cpu": 100},
        {"disk": 100},
        {"gpu": 34, "cpu": 33, "disk": 33},
        {"gpu": 50, "cpu": 50},
        {"cpu": 50, "disk": 50},
        {"gpu": 25, "disk": 75},
        {"gpu": 10, "cpu": 20, "disk": 70},
    ]
)
POLICIES = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 4),
    num_gpu_batches=st.integers(1, 5),
    weights=SPLITS,
    cache=SPLITS,
    activations=SPLITS,
    attend_on=st.sampled_from(["cpu", "gpu"]),
    overlap=st.booleans(),
    sep_layer=st.booleans(),
    pin_weight=st.booleans(),
)
DEVICES = st.sampled_from(["cpu", "emulated"])
LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=9)
SEEDS = st.integers(0, 999)
TOKENS = st.integers(1, 12)


@settings(max_examples=90)
@given(
    data=st.data(),
    policy=POLICIES,
    device=DEVICES,
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    lengths=LENGTHS,
    seed=SEEDS,
    tokens=TOKENS,
)
def test_greedy_ids(
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
    model, rows = tiny(data.draw(st.sampled_from(model_names))), prompts(lengths, seed)
    free = model.greedy(rows, tokens)
    made = np.unique(free[:, max(lengths) :]).tolist()
    stop = data.draw(st.lists(st.sampled_from(made), max_size=3))
    expected = model.greedy(rows, tokens, stop) if stop else free
    with OptLM(model.directory, policy, device=device, progress=False, order=order) as lm:
        np.testing.assert_array_equal(lm.generate(rows, tokens, stop=stop), expected)
        # The same model again, with buffers that held another call's data.
        again = rows[::-1][: policy.gpu_batch_size]
        np.testing.assert_array_equal(lm.generate(again, 2, stop=()), model.greedy(again, 2))


@settings(max_examples=50)
@given(
    data=st.data(),
    policy=POLICIES,
    device=DEVICES,
    ends=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 16)), min_size=1, max_size=6),
    seed=SEEDS,
)
def test_logits(
    data: st.DataObject,
    policy: Policy,
    device: str,
    ends: list[tuple[int, int]],
    seed: int,
    tiny: Any,
    model_names: list[str],
    prompts: Any,
) -> None:
    model = tiny(data.draw(st.sampled_from(model_names)))
    ids = torch.tensor(prompts([16] * len(ends), seed))
    columns = torch.arange(16)
    mask = torch.stack([(columns >= begin) & (columns < max(begin + 1, end)) for begin, end in ends]).long()
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        ours = lm.forward(ids, mask)
    there = mask.bool()
    torch.testing.assert_close(ours[there], model.logits(ids, mask)[there], rtol=0, atol=1e-4)
