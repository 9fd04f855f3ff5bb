"""Prompts that enter at a rate, in cells between those of rows that decode: the same ids, and the expected passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.layout import passes
from flexgen.layout.passes import Passes
from flexgen.layout.topology import SHARED
from flexgen.policy import Policy, Tier
from flexgen.predict.refilled_passes import refilled_passes
from flexgen.results.report import Stage
from flexgen.results.trace import Phase
from flexgen.runtime.choice import Choice, Limited, NewIds, Sampled, by_row
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ["llama gqa 2", "gemma2, every other layer with a window", "opt"]
SPLITS = [{"gpu": 100}, {"cpu": 100}, {"gpu": 50, "cpu": 50}]
TOKENS, PAD = 9, 1
LENGTHS = [5, 3, 9, 2, 7, 4, 6, 3, 8, 2, 5, 4, 3, 6, 7, 2, 5]


@pytest.fixture(autouse=True)
def _cells_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_CELL_TOKENS", 12)


def completed(lm: OptLM, rows: Any, choice: Choice) -> np.ndarray:
    return lm.generate_with(Completion(read_request(lm.spec, rows), TOKENS, choice, pad=PAD))


def ended(ids: np.ndarray, width: int, times: Any) -> np.ndarray:
    for row, time in zip(ids, times, strict=True):
        row[width + time :] = PAD
    return ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_ids_are_those_of_transformers(order: str, split: Any, device: str, tiny: Any, prompts: Any) -> None:
    """Rows of one length, which begin in turn and so end in turn, and rows of many lengths."""
    model, rows = tiny(NAMES[0]), prompts(LENGTHS)
    policy = Policy(
        gpu_batch_size=4, num_gpu_batches=2, weights={"gpu": 50, "cpu": 50}, cache=split, prefill_rows=3,
    )  # fmt: skip
    times = np.random.default_rng(0).integers(1, TOKENS + 1, len(rows)).tolist()
    with OptLM(model.directory, policy, device=device, order=order, progress=False) as lm:
        expected = model.greedy(rows, TOKENS)
        np.testing.assert_array_equal(completed(lm, rows, Sampled()), expected)
        out = completed(lm, rows, Limited(Sampled(), times))
        np.testing.assert_array_equal(out, ended(expected, max(LENGTHS), times))
        assert lm.stats is not None and lm.stats.new_tokens == sum(times)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_shared_prefix_and_windows(
    split: Any, attend_on: Any, device: str, tiny: Any, prompts: Any
) -> None:
    """Rows of different lengths attend to different positions of the prefix in a layer with a window."""
    model, (shared,) = tiny(NAMES[1]), prompts([34])
    rows = [[*shared, *own] for own in prompts(LENGTHS)]
    policy = Policy(
        gpu_batch_size=4, num_gpu_batches=2, weights={"gpu": 100}, cache=split, prefill_rows=1, attend_on=attend_on,
    )  # fmt: skip
    times = np.random.default_rng(2).integers(1, TOKENS + 1, len(rows)).tolist()
    with OptLM(model.directory, policy, device=device, dtype="float32", progress=False) as lm:
        out = completed(lm, rows, Limited(Sampled(), times))
        np.testing.assert_array_equal(out, ended(model.greedy(rows, TOKENS), 34 + max(LENGTHS), times))
        assert lm.stats is not None and lm.stats.prefix == 34


@settings(max_examples=60)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=14),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)),
    split=st.sampled_from(SPLITS),
    place=st.sampled_from([("cpu", "cpu"), ("emulated", "cpu"), ("emulated", "gpu")]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    page=st.integers(1, 6),
    sep_layer=st.booleans(),
    weights=st.sampled_from([{"gpu": 50, "cpu": 50}, {"disk": 100}]),
)
def test_any_shape(
    data: st.DataObject,
    lengths: list[int],
    shape: tuple[int, int, int],
    split: Any,
    place: tuple[str, str],
    order: str | None,
    page: int,
    sep_layer: bool,
    weights: Any,
    tiny: Any,
    prompts: Any,
) -> None:
    model, rows = tiny(data.draw(st.sampled_from(NAMES))), prompts(lengths)
    times = data.draw(st.lists(st.integers(1, TOKENS), min_size=len(rows), max_size=len(rows)))
    policy = Policy(
        gpu_batch_size=shape[0], num_gpu_batches=shape[1], prefill_rows=shape[2], cache=split,
        attend_on=place[1], sep_layer=sep_layer, weights=weights,
    )  # fmt: skip
    with (
        piece_sizes(page_tokens=page, memory_page_tokens=page),
        OptLM(model.directory, policy, device=place[0], order=order, progress=False) as lm,
    ):
        out = completed(lm, rows, Limited(Sampled(), times))
    np.testing.assert_array_equal(out, ended(model.greedy(rows, TOKENS), max(lengths), times))


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_short_prompts_that_enter_with_a_table_on_disk(device: str, tiny: Any, prompts: Any) -> None:
    """The buffer of their embeddings has room for one long prompt."""
    model, rows = tiny(NAMES[0]), prompts([8, *[4] * 8])
    policy = Policy(gpu_batch_size=9, prefill_rows=8, weights={"disk": 100}, cache={"cpu": 100})
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        np.testing.assert_array_equal(completed(lm, rows, Sampled()), model.greedy(rows, TOKENS))


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_encoded_cache(codec: str, device: str, tiny: Any, prompts: Any) -> None:
    rows, cache = prompts([4] * 9), {"cpu": dict(percent=100, codec=codec)}
    made = []
    for limit in (0, 2):
        policy = Policy(gpu_batch_size=3, num_gpu_batches=2, cache=cache, prefill_rows=limit)
        with OptLM(tiny(NAMES[0]).directory, policy, device=device, progress=False) as lm:
            made.append(completed(lm, rows, Sampled()))
    np.testing.assert_array_equal(made[1], made[0])


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_the_cells_of_each_pass(device: str, tiny: Any, prompts: Any, heads: list[int]) -> None:
    """One prompt enters in each pass, and decodes from the next one on. A place is free in the pass after its row. On
    the CPU, no cell computes a place without a row, and one product is for all cells of a pass."""
    model, rows = tiny(NAMES[0]), prompts([4] * 6)
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, prefill_rows=1)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        out = lm.generate(rows, 4, stop=())
        np.testing.assert_array_equal(out, model.greedy(rows, 4))
        assert lm.stats is not None
        stages = lm.stats.timing.stages
    if device == "cpu":
        assert heads == [1, 2, 3, 4, 4, 4, 3, 2, 1]
    else:
        both = [2, 1, 2]
        assert heads == [1, *[1, 2], *[1, 2], *both, *both, *both, *[2, 2], 2, 2]
    assert {stage: new for stage, (_, new, _) in stages.items()} == {
        Stage.FILL: 1 + 2 + 3 + 4, Stage.STEADY: 4, Stage.DRAIN: 4 + 3 + 2 + 1,
    }  # fmt: skip


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_prompts_that_begin_when_all_others_have_ended(order: str, tiny: Any, prompts: Any) -> None:
    """Their passes have the numbers of those before, and other weights are in the slots."""
    model, rows = tiny(NAMES[0]), prompts(LENGTHS[:5])
    policy = Policy(weights={"cpu": 100}, sep_layer=False)
    with OptLM(model.directory, policy, device="emulated", order=order, progress=False) as lm:
        for times in ([1] * 5, [2, 1, 3, 1, 2]):
            out = completed(lm, rows, Limited(Sampled(), times))
            np.testing.assert_array_equal(out, ended(model.greedy(rows, TOKENS), max(LENGTHS[:5]), times))


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_runs_load_the_weights_of_each_pass_once(limit: int, order: str, tiny: Any, prompts: Any) -> None:
    """Batches change after most passes, so that a run ends and another one begins."""
    rows, times = prompts([4] * 12), [1, 6, 2, 5, 3, 4] * 2
    policy = Policy(gpu_batch_size=2, num_gpu_batches=3, prefill_rows=limit, weights={"cpu": 100})
    with (
        piece_sizes(weight_bytes=1 << 20),
        OptLM(tiny(NAMES[0]).directory, policy, device="emulated", order=order, progress=False) as lm,
    ):
        lm.generate(rows, times, stop=())
        assert lm.stats is not None
        events = lm.stats.timing.trace.events
    loads = Counter(event.step[1:3] for event in events if event.step.op is Op.LOAD_WEIGHTS)
    layers, passes = ({at[n] for at in loads} for n in (1, 0))
    computed = {event.step[1:3] for event in events if event.step.op is Op.COMPUTE}
    last = max(number for number, _ in computed)
    assert set(loads.values()) == {1} and passes <= set(range(last + 2))
    assert {at for at in loads if at[0] <= last} == {at for at in computed if at[1] in layers}


def test_samples_do_not_depend_on_the_rate(tiny: Any, prompts: Any) -> None:
    model, rows, made = tiny(NAMES[0]), prompts(LENGTHS), []
    for size, batches, limit in ((17, 1, 0), (2, 2, 1), (3, 3, 2), (4, 1, 4)):
        policy = Policy(gpu_batch_size=size, num_gpu_batches=batches, prefill_rows=limit)
        with OptLM(model.directory, policy, device="emulated", progress=False) as lm:
            made.append(completed(lm, rows, Sampled(1.3, seed=7)))
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def test_listeners_hear_each_token_of_each_row_in_order(tiny: Any, prompts: Any) -> None:
    """The rows of a batch have different numbers of new tokens. Their options differ, too."""
    model, rows = tiny(NAMES[0]), prompts(LENGTHS)
    times = np.random.default_rng(1).integers(1, TOKENS + 1, len(rows)).tolist()
    options = [Sampled(temperature, seed=3) for temperature in (0.0, 1.2)]
    choice = Limited(by_row([options[row % 2] for row in range(len(rows))]), times)
    made = []
    for limit in (0, 3):
        heard: list[list[int]] = [[] for _ in rows]
        ends: list[int] = []

        def listen(new: NewIds, heard: list[list[int]] = heard, ends: list[int] = ends) -> None:
            columns = new.rows, new.ids.tolist(), new.live.tolist(), new.ended.tolist()
            for row, id, live, ended in zip(*columns, strict=True):
                if live:
                    assert new.token == len(heard[row])
                    heard[row].append(id)
                ends.extend([row] * ended)

        policy = Policy(gpu_batch_size=4, num_gpu_batches=2, prefill_rows=limit)
        with OptLM(model.directory, policy, device="emulated", progress=False) as lm:
            completion = Completion(read_request(lm.spec, rows), TOKENS, choice, pad=PAD)
            out = lm.generate_with(completion, listeners=[listen])
        assert sorted(ends) == list(range(len(rows))) and [len(ids) for ids in heard] == times
        assert [text[max(LENGTHS) :][:time].tolist() for text, time in zip(out, times, strict=True)] == heard
        made.append(heard)
    assert made[0] == made[1]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_call_stays_within_the_plan(split: Any, device: str, tiny: Any, prompts: Any) -> None:
    """Also calls with fewer batches, and with one new token, which computes whole batches of prompts."""
    model, rows = tiny(NAMES[0]), prompts([4] * 14)
    policy = Policy(gpu_batch_size=3, num_gpu_batches=2, cache=split, weights={"cpu": 100}, prefill_rows=2)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        ids = 8 * len(rows) * (len(rows[0]) + 1)  # plans do not count them
        stores = {Tier.CPU: lm._machine.host}
        if device != "cpu":
            stores[Tier.GPU] = lm._machine.device.memory
        for some, tokens in ((rows, TOKENS), (rows[:5], 3), (rows[:2], 2), (rows, 1)):
            used = {tier: store.used for tier, store in stores.items()}
            for store in stores.values():
                store.peak = store.used
            np.testing.assert_array_equal(lm.generate(some, tokens, stop=()), model.greedy(some, tokens))
            assert lm.stats is not None
            for tier, store in stores.items():
                needs = [n for n in lm.stats.plan.needs if n.tier is tier and n.role != "workspace"]
                planned = sum(
                    n.nbytes for n in needs if n.what != "activations"
                )  # they are a layer's results
                planned -= lm._plans.of_weights().on(tier)
                assert store.peak - used[tier] <= planned + (ids if tier is Tier.CPU else 0)
        assert lm.forward(rows[:3]).shape[0] == 3


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_lanes_are_timed_with_whole_batches(device: str, tiny: Any, prompts: Any) -> None:
    policy = Policy(gpu_batch_size=3, num_gpu_batches=2, prefill_rows=1)
    with OptLM(tiny(NAMES[0]).directory, policy, device=device, progress=False) as lm:
        assert lm.lane_seconds(prompts([4] * 6), 3)[Phase.DECODE]


def test_calls_in_which_nothing_enters(tiny: Any, prompts: Any) -> None:
    """One block, chunks of prompts, and a choice of the whole call."""
    model, rows = tiny(NAMES[0]), prompts(LENGTHS[:6])
    expected = model.greedy(rows, TOKENS)

    class Whole(Sampled):
        whole_call = True

    policy = Policy(gpu_batch_size=3, num_gpu_batches=2, prefill_rows=2)
    for one, choice in ((policy, Whole()), (policy.replace(prefill_chunk=3), Sampled()), (policy, Sampled())):
        with OptLM(model.directory, one, device="emulated", progress=False) as lm:
            np.testing.assert_array_equal(completed(lm, rows, choice), expected)


@settings(max_examples=25)
@given(
    times=st.lists(st.integers(1, TOKENS), min_size=1, max_size=24),
    size=st.integers(1, 4),
    batches=st.integers(1, 4),
    limit=st.integers(0, 5),
)
def test_predictions_assume_the_passes_of_a_run(
    times: list[int], size: int, batches: int, limit: int, tiny: Any, prompts: Any
) -> None:
    rows = prompts([5] * len(times))
    policy = Policy(gpu_batch_size=size, num_gpu_batches=batches, prefill_rows=limit)
    passes = Passes(5, rows=limit, batches=batches, closes_up=SHARED.closes_up(policy))
    expected = list(refilled_passes(times, policy, passes))
    with OptLM(tiny(NAMES[0]).directory, policy, device="cpu", progress=False) as lm:
        lm.generate(rows, times, stop=())
        assert lm.stats is not None
        timing = lm.stats.timing
    computed = [
        event.step.batch
        for event in timing.trace.events
        if event.step.op is Op.COMPUTE and event.step.layer == 1
    ]
    assert computed == [cell for one in expected for cell in range(len(one.rows))]
    for stage in Stage:
        some = [one for one in expected if one.stage is stage]
        _, new, places = timing.stages.get(stage, (0.0, 0, 0))
        assert new == sum(one.live for one in some)
        assert places == len(some) * min(policy.block_size, len(times))
