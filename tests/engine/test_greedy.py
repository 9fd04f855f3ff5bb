"""The ids and logits of OptLM are those of transformers: the cases that always run.

tests/engine/test_properties.py draws further combinations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.engine.model import OptLM
from flexgen.models import open_model
from flexgen.policy import Policy
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op

MODELS = [
    "opt",
    "opt post-norm projected",
    "opt without biases",
    "opt untied",
    "llama gqa 1 with biases, tied",
    "llama gqa 2",
    "llama gqa 8, scaled rope",
    "gemma2, every other layer with a window",
    "mistral with a window",
]
DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [3, 7, 5, 9, 2, 6, 4, 8]  # with blocks of 6: one whole, one of 2
ONE_TIER = [{"gpu": 100}, {"cpu": 100}, {"disk": 100}]


def test_list_of_models_is_complete(model_names: list[str]) -> None:
    assert model_names == MODELS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_part_of_each_class_on_each_tier(name: str, device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, given = tiny(name), prompts(LENGTHS)
    with OptLM(model.directory, mixed(), device=device, progress=False) as lm:
        ours = lm.generate(given, 10, stop=())
        assert all(lm.placement.nbytes.values()), "a tier without weights would prove less"
    np.testing.assert_array_equal(ours, model.greedy(given, 10))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize(
    ("overlap", "batches"), [(False, 1), (False, 3), (True, 1), (True, 3)], ids=lambda value: str(value)
)
def test_orders_that_a_policy_asks_for(
    overlap: bool,
    batches: int,
    sep_layer: bool,
    attend_on: str,
    device: str,
    tiny: Any,
    prompts: Any,
    mixed: Any,
) -> None:
    model, given = tiny("llama gqa 2"), prompts(LENGTHS)
    policy = mixed(num_gpu_batches=batches, overlap=overlap, sep_layer=sep_layer, attend_on=attend_on)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(given, 6, stop=()), model.greedy(given, 6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_orders_by_name(order: str, batches: int, device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)
    with OptLM(
        model.directory, mixed(num_gpu_batches=batches), device=device, progress=False, order=order
    ) as lm:
        np.testing.assert_array_equal(lm.generate(given, 6, stop=()), model.greedy(given, 6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("split", ONE_TIER, ids=lambda split: next(iter(split)))
def test_everything_on_one_tier(
    split: dict[str, int], attend_on: str, device: str, tiny: Any, prompts: Any
) -> None:
    model, given = tiny("llama gqa 8, scaled rope"), prompts(LENGTHS)
    policy = Policy(
        gpu_batch_size=4,
        num_gpu_batches=2,
        weights=split,
        cache=split,
        activations=split,
        attend_on=attend_on,
    )
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(given, 8, stop=()), model.greedy(given, 8))


@pytest.mark.parametrize("device", DEVICES)
def test_up_to_the_last_position(device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, given = tiny("opt"), prompts([16, 10])
    with OptLM(model.directory, mixed(), device=device, progress=False) as lm:
        tokens = lm.spec.max_positions - 16
        np.testing.assert_array_equal(lm.generate(given, tokens, stop=()), model.greedy(given, tokens))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_row_stops_inside_its_block(order: str, device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, given = tiny("llama gqa 2"), prompts(LENGTHS)
    free = model.greedy(given, 8)[:, max(LENGTHS) :]
    stop = [int(free[0, 2]), int(free[6, 4])]
    expected = model.greedy(given, 8, stop)
    stopped = (expected[:, -1] == 1) & (free[:, -1] != 1)
    assert 0 < stopped.sum() < len(given), "some rows must stop early and some must not"
    with OptLM(model.directory, mixed(), device=device, progress=False, order=order) as lm:
        np.testing.assert_array_equal(lm.generate(given, 8, stop=stop), expected)
        assert lm.stats is not None
        assert lm.stats.new_tokens == sum(_made(row, stop) for row in free)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_block_that_has_stopped_computes_no_later_tokens(
    order: str, device: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    model, given = tiny("llama gqa 2"), prompts([5]) * 5
    free = model.greedy(given[:1], 12)[0, 5:].tolist()
    last = next(n for n in range(2, 12) if free[n] not in free[:n])
    with OptLM(model.directory, mixed(), device=device, progress=False, order=order) as lm:
        ours = lm.generate(given, 12, stop=free[last])
        assert lm.stats is not None
        events = lm.stats.timing.trace.events
    computed = {event.step.token for event in events if event.step.op is Op.COMPUTE}
    assert computed == set(range(last + 1))
    np.testing.assert_array_equal(ours, model.greedy(given, 12, [free[last]]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_with_padding_at_either_end(
    name: str, device: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    model = tiny(name)
    ids = torch.tensor(prompts([12] * 7))
    ends = [(0, 12), (3, 12), (0, 8), (11, 12), (0, 1), (4, 9), (0, 12)]
    mask = torch.tensor([[begin <= n < end for n in range(12)] for begin, end in ends]).long()
    theirs = model.logits(ids, mask)
    assert theirs.std() > 0.5, "a flat reference would prove nothing"
    with OptLM(model.directory, mixed(), device=device, progress=False) as lm:
        ours = lm.forward(ids, mask)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-4)
    assert not ours[~mask.bool()].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_tokens", [4, 20])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_chunks(
    name: str, chunk_tokens: int, device: str, tiny: Any, prompts: Any, mixed: Any, monkeypatch: Any
) -> None:
    def in_chunks(*args: Any) -> Any:
        spec, checkpoint = open_model(*args)
        return replace(spec, chunk_tokens=chunk_tokens), checkpoint

    monkeypatch.setattr("flexgen.engine.model.open_model", in_chunks)
    model, given = tiny(name), prompts(LENGTHS)
    ids = torch.tensor(prompts([12] * 4))
    with OptLM(model.directory, mixed(), device=device, progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(given, 5, stop=()), model.greedy(given, 5))
        torch.testing.assert_close(
            lm.forward(ids), model.logits(ids, torch.ones_like(ids)), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["opt", "llama gqa 2"])
def test_bfloat16_is_close_to_float32(name: str, device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, given = tiny(name), prompts([9] * 6)
    ids = torch.tensor(given)
    theirs = model.logits(ids, torch.ones_like(ids))
    with OptLM(model.directory, mixed(), device=device, dtype="bfloat16", progress=False) as lm:
        ours = lm.forward(ids)
        first = lm.generate(given, 1, stop=())[:, -1]
    assert ours.dtype == torch.bfloat16
    error = (ours.float() - theirs).abs()
    assert error.mean() < 0.03 * theirs.std()
    # The first new token is the best of the last position's logits, rounding aside.
    assert (torch.from_numpy(first) == ours[:, -1].argmax(-1)).sum() >= 5


def _made(row: np.ndarray, stop: list[int]) -> int:
    """Tokens that a row makes, its stop id included."""
    ends = np.flatnonzero(np.isin(row, stop))
    return int(ends[0]) + 1 if len(ends) else len(row)
