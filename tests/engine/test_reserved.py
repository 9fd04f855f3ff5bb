"""The cache is reserved by need: rows that are put back to wait get the same ids, within the memory of the plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.layout.cache_pool import cache_pool
from flexgen.layout.passes import Passes
from flexgen.layout.plan import room_sizes
from flexgen.layout.prefix import SHORTEST
from flexgen.policy import Policy, Tier
from flexgen.predict.refilled_passes import refilled_passes
from flexgen.runtime.choice import Choice, Limited, NewIds, Sampled
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op
from flexgen.workload import Workload

NAME = "llama gqa 2"
TOKENS = 12
SPLITS = [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, {"gpu": 34, "cpu": 33, "disk": 33}]
LENGTHS = [5, 3, 9, 2, 7, 4, 6, 3, 8, 2, 5, 4, 3, 6, 7, 2, 5, 9, 8, 4, 3]


def generated(lm: OptLM, rows: Any, choice: Choice, tokens: int = TOKENS, **options: Any) -> np.ndarray:
    return lm.generate_with(Completion(read_request(lm.spec, rows), tokens, choice), **options)


def policy(**fields: Any) -> Policy:
    return Policy(**dict(gpu_batch_size=2, num_gpu_batches=8, cache={"cpu": 100}, reserve_new=1) | fields)


def put_back(lm: OptLM) -> int:
    assert lm.stats is not None
    return lm.stats.timing.put_back


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_long_rows_wait_and_end_with_the_same_ids(order: str, device: str, tiny: Any, prompts: Any) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    with (
        piece_sizes(memory_page_tokens=3),
        OptLM(model.directory, policy(), device=device, progress=False, order=order) as lm,
    ):
        np.testing.assert_array_equal(lm.generate(rows, TOKENS, stop=()), model.greedy(rows, TOKENS))
        assert put_back(lm) > 4
        assert lm.stats is not None and lm.stats.new_tokens == len(rows) * TOKENS
        report = lm.last_report(read_request(lm.spec, rows), TOKENS, TOKENS)
        assert report.put_back == put_back(lm)
        assert (
            f"cache for 1 of 12 new tokens per row on average; rows were put back to wait {report.put_back}"
            in (report.card())
        )
        np.testing.assert_array_equal(lm.generate(rows, 1, stop=()), model.greedy(rows, 1))
        assert put_back(lm) == 0, "all of the cache is reserved for fewer tokens than the policy says"


@settings(max_examples=60)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=14),
    size=st.integers(1, 4),
    batches=st.integers(1, 4),
    cache=st.sampled_from([*SPLITS, {"cpu": 100}, {"cpu": 60, "disk": 40}]),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.sampled_from(sorted(ORDERS)),
    page=st.integers(1, 6),
    chunk=st.sampled_from([0, 0, 3]),
    reserve=st.integers(1, TOKENS),
    prefix=st.sampled_from([0, 0, SHORTEST]),
    sampled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_pool_gives_the_ids_of_a_whole_cache(
    data: st.DataObject,
    lengths: list[int],
    size: int,
    batches: int,
    cache: Any,
    attend_on: str,
    device: str,
    order: str,
    page: int,
    chunk: int,
    reserve: int,
    prefix: int,
    sampled: bool,
    seed: int,
    tiny: Any,
    prompts: Any,
    model_names: list[str],
) -> None:
    model = tiny(data.draw(st.sampled_from(model_names)))
    if prefix:  # the models have 48 positions
        lengths = [min(length, 4) for length in lengths]
    (head,) = prompts([prefix], seed + 1)
    rows = [head + own for own in prompts(lengths, seed)]
    times = data.draw(st.lists(st.integers(1, TOKENS), min_size=len(rows), max_size=len(rows)))
    needed = Policy(
        gpu_batch_size=size, num_gpu_batches=batches, cache=cache, activations=cache, attend_on=attend_on,
        prefill_chunk=chunk, reserve_new=reserve,
    )  # fmt: skip

    def ids(policy: Policy) -> np.ndarray:
        choice = Limited(Sampled(1.3 if sampled else 0.0, seed=seed), times)
        with OptLM(model.directory, policy, device=device, progress=False, order=order) as lm:
            return generated(lm, rows, choice)

    with piece_sizes(page_tokens=page, memory_page_tokens=page):
        np.testing.assert_array_equal(ids(needed), ids(needed.replace(reserve_new=0)))


def test_samples_do_not_depend_on_the_pool(tiny: Any, prompts: Any) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    made = []
    for reserve in (0, 1, 4):
        with (
            piece_sizes(memory_page_tokens=2),
            OptLM(model.directory, policy(reserve_new=reserve), device="cpu", progress=False) as lm,
        ):
            made.append(generated(lm, rows, Sampled(1.3, seed=7)))
            assert bool(put_back(lm)) == bool(reserve)
    np.testing.assert_array_equal(made[1], made[0])
    np.testing.assert_array_equal(made[2], made[0])


def test_rows_are_heard_once_and_in_order(tiny: Any, prompts: Any) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    heard: list[list[int]] = [[] for _ in rows]

    def listen(new: NewIds) -> None:
        for n, row in enumerate(new.rows):
            if new.live[n]:
                assert new.token == len(heard[row])
                heard[row].append(int(new.ids[n]))

    with (
        piece_sizes(memory_page_tokens=2),
        OptLM(model.directory, policy(), device="cpu", progress=False) as lm,
    ):
        out = generated(lm, rows, Sampled(), listeners=[listen])
        assert put_back(lm)
        streamed = dict(lm.stream(rows, TOKENS, stop=()))
    np.testing.assert_array_equal(np.array(heard), out[:, -TOKENS:])
    for n, ids in streamed.items():
        np.testing.assert_array_equal(ids, out[n, -TOKENS:])


@pytest.mark.parametrize("split", [{"cpu": 100}, {"gpu": 34, "cpu": 33, "disk": 33}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_memory_stays_within_the_plan(device: str, split: Any, tiny: Any, prompts: Any) -> None:
    """The pages that the system has provided for the cache, after each token, and the bytes that stores count."""
    model, rows = tiny(NAME), prompts(LENGTHS)
    most = 0
    with (
        piece_sizes(memory_page_tokens=3),
        OptLM(model.directory, policy(cache=split, activations=split), device=device, progress=False) as lm,
    ):
        machine = lm._machine
        pools = machine.host._by_need, machine.device.memory._by_need  # type: ignore[attr-defined]

        def listen(new: NewIds) -> None:
            nonlocal most
            if not new.token % 3:  # the system takes long to answer
                most = max(most, resident({**pools[0], **pools[1]}))

        generated(lm, rows, Sampled(), listeners=[listen])
        assert put_back(lm) and lm.stats is not None
        plan = lm.stats.plan
        assert machine.host.peak <= plan.on(Tier.CPU) + prompt_bytes(rows)
        homes = sum(
            n.nbytes for n in plan.needs if (n.what, n.role) == ("cache", "home") and n.tier is not Tier.DISK
        )
        assert 0 < most <= homes
        assert not any(pools), "nothing of a call stays behind"


def prompt_bytes(rows: Sequence[Sequence[int]]) -> int:
    """The ids of the prompts and of what may be added to them, which plans do not count."""
    return 8 * len(rows) * (max(map(len, rows)) + TOKENS + 1)


def test_a_whole_call_reserves_all(tiny: Any, prompts: Any) -> None:
    """A choice for the whole call sees all rows in each pass, so none may wait."""

    class Whole(Sampled):
        whole_call = True

    model, rows = tiny(NAME), prompts(LENGTHS)
    with OptLM(model.directory, policy(), device="cpu", progress=False) as lm:
        np.testing.assert_array_equal(generated(lm, rows, Whole()), model.greedy(rows, TOKENS))
        assert put_back(lm) == 0
        assert lm.stats is not None and lm.stats.policy.reserve_new == 0


def test_a_conversation_reserves_all(tiny: Any, prompts: Any) -> None:
    model, (row,) = tiny(NAME), prompts([9])
    with OptLM(model.directory, policy(), device="cpu", progress=False) as lm:
        with lm.conversation(room=32) as chat:
            np.testing.assert_array_equal(chat.generate(row, TOKENS, stop=()), model.greedy([row], TOKENS)[0])
        assert put_back(lm) == 0


@settings(max_examples=30)
@given(
    times=st.lists(st.integers(1, TOKENS), min_size=1, max_size=24),
    size=st.integers(1, 4),
    batches=st.integers(1, 4),
    chunk=st.sampled_from([0, 3]),
    reserve=st.integers(1, 6),
    page=st.integers(1, 4),
)
def test_predictions_assume_the_passes_of_a_run(
    times: list[int], size: int, batches: int, chunk: int, reserve: int, page: int, tiny: Any, prompts: Any
) -> None:
    rows, tokens = prompts([5] * len(times)), max(times)
    asked = policy(gpu_batch_size=size, num_gpu_batches=batches, prefill_chunk=chunk, reserve_new=reserve)
    workload = Workload(5, tokens, len(rows))
    with (
        piece_sizes(memory_page_tokens=page),
        OptLM(tiny(NAME).directory, asked, device="cpu", progress=False) as lm,
    ):
        lm.generate(rows, times, stop=())
        assert lm.stats is not None
        timing = lm.stats.timing
        shape = room_sizes(asked, len(rows), tokens), workload, torch.float32, lm._machine.device.topology
        pool = cache_pool(lm._layers, asked, *shape)
    passes = list(refilled_passes(times, asked, Passes.of(workload, asked), pool))
    computed = [
        event.step.batch
        for event in timing.trace.events
        if event.step.op is Op.COMPUTE and event.step.layer == 1
    ]
    assert computed == [batch for one in passes for batch in range(len(one.rows))]
    assert timing.put_back == sum(one.put_back for one in passes)
    assert sum(one.live for one in passes) == sum(times)


def resident(mappings: Mapping[int, Any]) -> int:
    """The bytes of memory by address that the system has provided (proc(5), smaps)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(part, 16) for part in found.groups())
            inside = any(begin < address + len(of) and address < end for address, of in mappings.items())
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
