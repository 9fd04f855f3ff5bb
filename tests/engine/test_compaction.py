"""Rows that have stopped leave the batch: the ids stay those of transformers, and fewer rows are computed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen.engine.model import OptLM
from flexgen.errors import LaneError
from flexgen.memory.disk import DiskIO
from flexgen.policy import Policy, Tier
from flexgen.runtime import compaction
from flexgen.runtime.kvcache import KVCache
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
NAME = "llama gqa 2"
LENGTHS = [9, 3, 7, 5, 8, 2, 6, 4, 3, 7, 5, 6]
TOKENS = 14
SPLITS = [
    {"gpu": 100},
    {"cpu": 100},
    {"disk": 100},
    {"gpu": 34, "cpu": 33, "disk": 33},
    {"gpu": 43, "cpu": 43, "disk": 14},
    {"gpu": 30, "disk": 70},
]


def ends(free: np.ndarray, stop: Sequence[int]) -> list[int]:
    """Tokens that each row makes, its stop id included; `free` are ids without a stop."""
    found = [np.flatnonzero(np.isin(row, stop)) for row in free]
    return [int(at[0]) + 1 if len(at) else len(row) for at, row in zip(found, free, strict=True)]


def staggered(model: Any, rows: list[list[int]], tokens: int = TOKENS) -> tuple[list[int], list[int]]:
    """Stop ids under which the rows stop at many different tokens and the last one late; and those tokens."""
    free = model.greedy(rows, tokens)[:, max(map(len, rows)) :]
    return _stops(tuple(map(tuple, free.tolist())))


@functools.cache
def _stops(rows: tuple[tuple[int, ...], ...]) -> tuple[list[int], list[int]]:
    free = np.array(rows)
    rng, ids = np.random.default_rng(0), np.unique(free)
    drawn = [rng.choice(ids, size=rng.integers(1, 7), replace=False).tolist() for _ in range(300)]
    stop = max(drawn, key=lambda stop: len(set(ends(free, stop))))
    found = ends(free, stop)
    assert len(set(found)) >= 5 and max(found) > 8, "rows must stop at different tokens, some of them late"
    return stop, found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows move together whenever one has stopped, which is more often than it pays."""

    def regrouped(batches: Any, stopped: Any, tokens_left: int, entering: Any, waiting: bool) -> Any:
        assert not entering, "there are no parts of prompts"
        rows = [row for batch in batches for row in batch if not stopped[row]]
        size = max(map(len, batches))
        same = len(rows) == sum(map(len, batches))
        return None if same else [rows[n : n + size] for n in range(0, len(rows), size)]

    monkeypatch.setattr("flexgen.runtime.tokens.regrouped", regrouped)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", SPLITS[:4], ids=str)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_ids_are_those_of_transformers(
    order: str, split: Any, device: str, tiny: Any, prompts: Any, mixed: Any, heads: list[int]
) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, _ = staggered(model, rows)
    policy = mixed(cache=split, gpu_batch_size=4, num_gpu_batches=3)
    with OptLM(model.directory, policy, device=device, progress=False, order=order) as lm:
        ours = lm.generate(rows, TOKENS, stop=stop)
        np.testing.assert_array_equal(ours, model.greedy(rows, TOKENS, stop))
    assert sum(heads) < 0.8 * len(rows) * TOKENS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("split", SPLITS[2:5], ids=str)
def test_many_moves(
    split: Any, attend_on: str, device: str, tiny: Any, prompts: Any, mixed: Any, eager: None
) -> None:
    """Two blocks, so that a cache that has been regrouped serves other prompts again."""
    model, rows = tiny(NAME), prompts(LENGTHS * 2)
    stop, _ = staggered(model, rows)
    policy = mixed(cache=split, activations=split, gpu_batch_size=4, num_gpu_batches=3, attend_on=attend_on)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        expected = model.greedy(rows, TOKENS, stop)
        np.testing.assert_array_equal(lm.generate(rows, TOKENS, stop=stop), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
def test_encoded_caches_move_as_they_are_kept(
    attend_on: str, device: str, tiny: Any, prompts: Any, mixed: Any, eager: None
) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, found = staggered(model, rows)
    shares = {tier: {"percent": percent, "codec": "int8"} for tier, percent in SPLITS[3].items()}
    policy = mixed(cache=shares, gpu_batch_size=5, num_gpu_batches=3, attend_on=attend_on)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        free, ours = lm.generate(rows, TOKENS, stop=()), lm.generate(rows, TOKENS, stop=stop)
    width = max(map(len, rows))
    for row, at in enumerate(ends(free[:, width:], stop)):
        np.testing.assert_array_equal(ours[row, : width + at], free[row, : width + at])
    assert len(set(found)) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_rows_change_their_codec_with_their_tier(
    device: str, tiny: Any, prompts: Any, mixed: Any, eager: None
) -> None:
    """Rows that move to a tier with another codec are encoded again: int8 is close enough for the same ids."""
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, _ = staggered(model, rows)
    shares = {"gpu": 34, "cpu": {"percent": 33, "codec": "int8"}, "disk": 33}
    policy = mixed(cache=shares, gpu_batch_size=5, num_gpu_batches=3)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        ours, expected = lm.generate(rows, TOKENS, stop=stop), model.greedy(rows, TOKENS, stop)
    assert (ours == expected).mean() > 0.9


@settings(max_examples=40)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    size=st.integers(1, 6),
    batches=st.integers(1, 3),
    cache=st.sampled_from(SPLITS),
    activations=st.sampled_from(SPLITS),
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.sampled_from(sorted(ORDERS)),
    page=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_times_to_stop(
    data: st.DataObject,
    lengths: list[int],
    size: int,
    batches: int,
    cache: Any,
    activations: Any,
    device: str,
    order: str,
    page: int,
    seed: int,
    tiny: Any,
    prompts: Any,
    model_names: list[str],
) -> None:
    model, rows = tiny(data.draw(st.sampled_from(model_names))), prompts(lengths, seed)
    made = np.unique(model.greedy(rows, TOKENS)[:, max(lengths) :]).tolist()
    stop = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=8))
    policy = Policy(gpu_batch_size=size, num_gpu_batches=batches, cache=cache, activations=activations)
    with (
        piece_sizes(page_tokens=page),
        OptLM(model.directory, policy, device=device, progress=False, order=order) as lm,
    ):
        expected = model.greedy(rows, TOKENS, stop)
        np.testing.assert_array_equal(lm.generate(rows, TOKENS, stop=stop), expected)


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("batches", [1, 3])
def test_rows_that_are_computed(
    batches: int, order: str, tiny: Any, prompts: Any, mixed: Any, heads: list[int]
) -> None:
    """The rows of each token by the rule, from the tokens at which the rows stop."""
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, found = staggered(model, rows)
    found = [found[n] for n in sorted(range(len(rows)), key=lambda n: -LENGTHS[n])]
    size = 12 // batches
    groups = [list(range(n, n + size)) for n in range(0, 12, size)]
    expected = []
    for token in range(TOKENS):
        expected.append([len(group) for group in groups])
        groups_left = [[row for row in group if found[row] > token + 1] for group in groups]
        left = list(itertools.chain.from_iterable(groups_left))
        if not left:
            break
        if 2 * len(left) <= sum(expected[-1]) and TOKENS - token - 1 >= 2:
            groups = [left[n : n + size] for n in range(0, len(left), size)]
        else:
            groups = [group for group, still in zip(groups, groups_left, strict=True) if still]
    policy = mixed(gpu_batch_size=size, num_gpu_batches=batches)
    with OptLM(model.directory, policy, device="emulated", progress=False, order=order) as lm:
        lm.generate(rows, TOKENS, stop=stop)
        assert lm.stats is not None
        events = lm.stats.timing.trace.events
    assert heads == [count for counts in expected for count in counts]
    assert len(set(map(sum, expected))) >= 3, "rows must have left at least twice"
    computed = {event.step[1:] for event in events if event.step.op is Op.COMPUTE}
    assert {(token, batch) for token, _, batch in computed} == {
        (token, batch) for token, counts in enumerate(expected) for batch in range(len(counts))
    }, "the trace counts the tokens of the text"


def test_a_batch_that_has_stopped_is_left_out_and_nothing_moves(
    tiny: Any, prompts: Any, mixed: Any, heads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(*args: Any) -> Any:
        raise AssertionError("rows move")

    monkeypatch.setattr("flexgen.runtime.cache_storage.gather", gather)
    model = tiny(NAME)
    one, *others = prompts([6] * 30)
    first = model.greedy([one], 1)[0, -1]
    free = model.greedy(others, 6)[:, 6:]
    others = [row for row, ids in zip(others, free, strict=True) if first not in ids][:4]
    rows = [*others[:2], one, one, *others[2:]]
    policy = mixed(gpu_batch_size=2, num_gpu_batches=3)
    with OptLM(model.directory, policy, device="emulated", progress=False) as lm:
        ours = lm.generate(rows, 6, stop=int(first))
    np.testing.assert_array_equal(ours, model.greedy(rows, 6, [int(first)]))
    assert heads == [2] * (3 + 5 * 2)


def test_without_stops_nothing_waits_and_nothing_moves(
    tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any) -> Any:
        raise AssertionError("there is nothing to stop for")

    monkeypatch.setattr("flexgen.runtime.tokens.regrouped", asked)
    model, rows = tiny(NAME), prompts(LENGTHS)
    with OptLM(model.directory, mixed(), device="emulated", progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(rows, 6, stop=()), model.greedy(rows, 6))
        lm.forward(rows)
        lm.lane_seconds(rows, 6)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_moving_stays_within_the_plan(
    split: Any, device: str, tiny: Any, prompts: Any, mixed: Any, eager: None
) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, _ = staggered(model, rows)
    policy = mixed(cache=split, gpu_batch_size=4, num_gpu_batches=3)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        machine = lm._machine
        lm.generate(rows, TOKENS, stop=())
        peaks = machine.host.peak, machine.device.memory.peak, machine.disk.peak
        lm.generate(rows, TOKENS, stop=stop)
        assert (machine.host.peak, machine.device.memory.peak, machine.disk.peak) == peaks
        assert machine.disk.used == 0, "nothing of a call stays behind"


def test_what_is_gathered_is_in_the_plan(
    tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[Tier, int] = {}
    gather = compaction.gather

    def counted(moved: Any, segments: Any, *args: Any) -> Any:
        held = gather(moved, segments, *args)
        for segment, (k, v) in zip(segments, held, strict=True):
            tier = Tier.GPU if segment.tier is Tier.GPU else Tier.CPU
            now[tier] = now.get(tier, 0) + k.nbytes + v.nbytes
        for tier, nbytes in now.items():
            taken[tier] = max(taken.get(tier, 0), nbytes)
        now.clear()
        return held

    now: dict[Tier, int] = {}
    monkeypatch.setattr("flexgen.runtime.cache_storage.gather", counted)
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, _ = staggered(model, rows)
    policy = mixed(gpu_batch_size=12, num_gpu_batches=1)
    with OptLM(model.directory, policy, device="emulated", progress=False) as lm:
        lm.generate(rows, TOKENS, stop=stop)
        assert lm.stats is not None
        plan = lm.stats.plan
    workspace = {(n.tier, n.what): n.nbytes for n in plan.needs if n.role == "workspace"}
    assert 0 < taken[Tier.GPU] <= workspace[Tier.GPU, "activations"]
    assert 0 < taken[Tier.CPU] <= workspace[Tier.CPU, "cache"]


def test_a_seed_repeats(tiny: Any, prompts: Any, mixed: Any, heads: list[int]) -> None:
    rows, stop = prompts(LENGTHS), [5, 9, 17, 23, 31, 40, 51]
    options: dict[str, Any] = dict(do_sample=True, temperature=1.5, stop=stop)
    with OptLM(tiny(NAME).directory, mixed(), device="emulated", progress=False) as lm:
        first = lm.generate(rows, TOKENS, seed=3, **options)
        assert len(heads) and sum(heads) < len(rows) * TOKENS * 0.8, "rows must have left"
        np.testing.assert_array_equal(first, lm.generate(rows, TOKENS, seed=3, **options))
        assert (first != lm.generate(rows, TOKENS, seed=4, **options)).any()
    for row in first[:, max(LENGTHS) :]:
        (made,) = ends(row[None], stop)
        assert (row[made:] == 1).all()


def test_drawn_ids_are_among_those_allowed(tiny: Any, prompts: Any, mixed: Any, eager: None) -> None:
    """With one id to draw from at each step, rows that move keep their own."""
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, _ = staggered(model, rows)
    with OptLM(model.directory, mixed(), device="cpu", progress=False) as lm:
        ours = lm.generate(rows, TOKENS, do_sample=True, top_k=1, stop=stop, seed=0)
    np.testing.assert_array_equal(ours, model.greedy(rows, TOKENS, stop))


@pytest.mark.parametrize("method", ["read", "write"])
def test_an_error_while_rows_move_reaches_the_caller(
    method: str, tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny(NAME), prompts(LENGTHS)
    stop, _ = staggered(model, rows)
    regroup = KVCache.regroup

    def failing(self: KVCache, *args: Any) -> None:
        def out(*args: Any) -> None:
            raise OSError("the cable is out")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiskIO, method, out)
            regroup(self, *args)

    policy = mixed(cache={"disk": 100}, gpu_batch_size=12)
    with OptLM(model.directory, policy, device="cpu", progress=False) as lm:
        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "regroup", failing)
            with pytest.raises(LaneError, match="the cable is out") as raised:
                lm.generate(rows, TOKENS, stop=stop)
        assert "before token" in str(raised.value)
        np.testing.assert_array_equal(lm.generate(rows, TOKENS, stop=stop), model.greedy(rows, TOKENS, stop))
