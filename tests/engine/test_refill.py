"""Prompts enter in the batches of rows that have ended: the ids stay those of transformers, in fewer passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.errors import RequestError
from flexgen.layout.passes import Passes
from flexgen.layout.prefix import SHORTEST
from flexgen.memory.disk import DiskIO
from flexgen.policy import Policy
from flexgen.predict.refilled_passes import refilled_passes
from flexgen.results.report import Stage
from flexgen.runtime.choice import Choice, Limited, NewIds, Sampled
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
NAME = "llama gqa 2"
TOKENS = 12
SPLITS = [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, {"gpu": 34, "cpu": 33, "disk": 33}]
PAD = 0


def cut(ids: np.ndarray, width: int, times: Sequence[int]) -> np.ndarray:
    """The ids of a call without stops, with pad ids after the end of each row."""
    ids = ids.copy()
    for row, time in zip(ids, times, strict=True):
        row[width + time :] = PAD
    return ids


def generated(
    lm: OptLM, rows: Any, choice: Choice, tokens: int = TOKENS, sorted_in: int | None = None, **options: Any
) -> np.ndarray:
    request = replace(read_request(lm.spec, rows), sorted_in=sorted_in)
    return lm.generate_with(Completion(request, tokens, choice, pad=PAD), **options)


def expected(model: Any, rows: Any, times: Sequence[int], tokens: int = TOKENS) -> np.ndarray:
    width = max(map(len, rows))
    out = cut(model.greedy(rows, tokens), width, times)
    for row, given_ids in zip(out, rows, strict=True):
        row[: width - len(given_ids)] = PAD
    return out


def geometric(rows: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).geometric(0.3, size=rows).clip(1, TOKENS).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_ids_are_those_of_transformers(
    order: str, split: Any, device: str, tiny: Any, prompts: Any, mixed: Any, heads: list[int]
) -> None:
    model, rows = tiny(NAME), prompts([5, 3, 9, 2, 7, 4, 6, 3, 8, 2, 5, 4, 3, 6, 7, 2, 5])
    times = geometric(len(rows))
    policy = mixed(cache=split, gpu_batch_size=2, num_gpu_batches=3)
    with OptLM(model.directory, policy, device=device, progress=False, order=order) as lm:
        np.testing.assert_array_equal(
            generated(lm, rows, Limited(Sampled(), times)), expected(model, rows, times)
        )
        assert lm.stats is not None
        refilled = sum(lm.stats.timing.ran)
        blocks = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
        alone = sum(max(times[n] for n in blocks[at : at + 6]) for at in range(0, len(rows), 6))
        assert refilled < alone, "passes of block after block"
        assert lm.stats.new_tokens == sum(times)


@settings(max_examples=40)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=16),
    size=st.integers(1, 4),
    batches=st.integers(1, 3),
    cache=st.sampled_from(SPLITS),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.sampled_from(sorted(ORDERS)),
    page=st.integers(1, 6),
    chunk=st.sampled_from([0, 3]),
    seed=st.integers(0, 99),
    prefix=st.sampled_from([0, 0, SHORTEST]),
    sorted_in=st.sampled_from([None, 1, 3]),
)
def test_any_times_to_end(
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
    seed: int,
    prefix: int,
    sorted_in: int | None,
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
    policy = Policy(
        gpu_batch_size=size, num_gpu_batches=batches, cache=cache, activations=cache, attend_on=attend_on,
        prefill_chunk=chunk,
    )  # fmt: skip
    with (
        piece_sizes(page_tokens=page),
        OptLM(model.directory, policy, device=device, progress=False, order=order) as lm,
    ):
        ids = generated(lm, rows, Limited(Sampled(), times), sorted_in=sorted_in)
        np.testing.assert_array_equal(ids, expected(model, rows, times))
        assert lm.stats is not None
        assert (lm.stats.prefix >= SHORTEST) == (prefix > 0 and len(rows) > 1)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("times", "computed", "numbers"),
    [
        # the second batch ends, and another enters
        ([6, 6, 1, 1, 2, 2], [2, 2] * 3 + [2] * 3, [*range(6)]),
        # half of the rows end: the others move together
        ([1, 6, 1, 6, 2, 2], [2, 2] * 3 + [2] * 3, [*range(6)]),
        # no row ends early: block after block
        ([6, 6, 6, 6, 6, 6], [2, 2] * 6 + [2] * 6, [*range(6), *range(6)]),
    ],
)
def test_the_rows_of_each_pass(
    times: list[int],
    computed: list[int],
    numbers: list[int],
    device: str,
    tiny: Any,
    prompts: Any,
    mixed: Any,
    heads: list[int],
) -> None:
    """`numbers`: those of the passes in the trace."""
    model, rows = tiny(NAME), prompts([4] * 6)
    policy = mixed(gpu_batch_size=2, num_gpu_batches=2)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        np.testing.assert_array_equal(
            generated(lm, rows, Limited(Sampled(), times), 6), expected(model, rows, times, 6)
        )
        assert lm.stats is not None
        steps = [event.step for event in lm.stats.timing.trace.events]
    assert heads == computed
    passes = [step.token for step in steps if step.op is Op.COMPUTE and (step.layer, step.batch) == (0, 0)]
    assert passes == numbers


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_rows_that_began_at_many_different_passes(device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    """Large batches, whose rows come from several batches and are sorted by the numbers of their tokens."""
    rng = np.random.default_rng(1)
    model, rows = tiny(NAME), prompts(rng.integers(2, 6, 90).tolist())
    times = rng.integers(1, TOKENS + 1, len(rows)).tolist()
    policy = mixed(cache=SPLITS[3], gpu_batch_size=8, num_gpu_batches=4)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        np.testing.assert_array_equal(
            generated(lm, rows, Limited(Sampled(), times)), expected(model, rows, times)
        )


def test_samples_do_not_depend_on_the_batches(tiny: Any, prompts: Any, mixed: Any) -> None:
    model, rows = tiny(NAME), prompts([5, 3, 9, 2, 7, 4, 6, 3, 8, 2, 5, 4])
    times, made = geometric(len(rows)), []
    for size, batches in ((12, 1), (2, 2), (1, 3)):
        policy = mixed(gpu_batch_size=size, num_gpu_batches=batches)
        with OptLM(model.directory, policy, device="emulated", progress=False) as lm:
            made.append(generated(lm, rows, Limited(Sampled(1.3, seed=7), times)))
    np.testing.assert_array_equal(made[1], made[0])
    np.testing.assert_array_equal(made[2], made[0])


def test_rows_are_heard_as_they_end(tiny: Any, prompts: Any, mixed: Any) -> None:
    """A row ends before the last prompts begin, and its tokens come in order."""
    model, rows = tiny(NAME), prompts([4] * 8)
    times, heard, ended = [9, 1, 2, 1, 9, 9, 3, 9], [0] * 8, []

    def listen(new: NewIds) -> None:
        for n, row in enumerate(new.rows):
            if new.live[n]:
                assert new.token == heard[row]
                heard[row] += 1
            if new.ended[n]:
                ended.append((row, sum(count > 0 for count in heard)))

    policy = mixed(gpu_batch_size=1, num_gpu_batches=2)
    with OptLM(model.directory, policy, device="cpu", progress=False) as lm:
        generated(lm, rows, Limited(Sampled(), times), listeners=[listen])
    assert heard == times
    assert sorted(row for row, _ in ended) == list(range(8))
    assert ended[0] == (1, 2), "row 1 ends when only two prompts have begun"


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_entering_stays_within_the_plan(split: Any, device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, rows = tiny(NAME), prompts([5, 3, 9, 2, 7, 4, 6, 3, 8, 2, 5, 4])
    policy = mixed(cache=split, gpu_batch_size=2, num_gpu_batches=3)
    with OptLM(model.directory, policy, device=device, progress=False) as lm:
        machine = lm._machine
        lm.generate(rows, TOKENS, stop=())
        peaks = machine.host.peak, machine.device.memory.peak, machine.disk.peak
        generated(lm, rows, Limited(Sampled(), geometric(len(rows))))
        assert (machine.host.peak, machine.device.memory.peak, machine.disk.peak) == peaks
        assert machine.disk.used == 0, "nothing of a call stays behind"
        np.testing.assert_array_equal(lm.generate(rows, 3, stop=()), model.greedy(rows, 3))


def test_an_error_after_prompts_have_entered_leaves_a_working_model(
    tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny(NAME), prompts([4] * 8)
    policy = mixed(cache={"disk": 100}, gpu_batch_size=1, num_gpu_batches=2)
    with OptLM(model.directory, policy, device="cpu", progress=False) as lm:
        with monkeypatch.context() as patch:
            entered: list[int] = []

            def listen(new: NewIds) -> None:
                entered.extend(new.rows)
                if len(set(entered)) > 3:
                    patch.setattr(DiskIO, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))

            with pytest.raises(Exception, match="full"):
                generated(lm, rows, Limited(Sampled(), [2, 1] * 4), listeners=[listen])
        np.testing.assert_array_equal(
            generated(lm, rows, Limited(Sampled(), [2, 1] * 4)), expected(model, rows, [2, 1] * 4)
        )


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_each_prompt_has_its_own_number_of_tokens(device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, rows = tiny(NAME), prompts([5, 3, 9, 2, 7, 4, 6, 3, 8])
    times = geometric(len(rows))
    with OptLM(model.directory, mixed(gpu_batch_size=2), device=device, progress=False) as lm:
        out = lm.generate(rows, times, stop=())
        streamed = dict(lm.stream(rows, np.array(times), stop=()))
    width, longest = max(map(len, rows)), max(times)
    assert out.shape == (len(rows), width + longest)
    every = model.greedy(rows, longest)[:, width:]
    for n, time in enumerate(times):
        np.testing.assert_array_equal(out[n, width : width + time], every[n, :time])
        assert (out[n, width + time :] == lm.spec.pad_token_id).all()
        np.testing.assert_array_equal(streamed[n], every[n, :time])


def test_numbers_of_tokens_that_are_wrong(tiny: Any, prompts: Any, mixed: Any) -> None:
    rows = prompts([5, 30])
    with OptLM(tiny(NAME).directory, mixed(), device="cpu", progress=False) as lm:
        for wrong, said in (
            ([3], r"max_new_tokens has 1 numbers for 2 prompts; give one number, or one for each prompt"),
            ([3, 0], r"max_new_tokens\[1\] is 0; it must be a whole number >= 1"),
            ([True, 2], r"max_new_tokens\[0\] is True"),
            ([3, 2.5], r"max_new_tokens\[1\] is 2.5"),
            ("34", "max_new_tokens is '34'"),
        ):
            with pytest.raises(RequestError, match=said):
                lm.generate(rows, wrong)
    with OptLM(tiny("opt").directory, mixed(), device="cpu", progress=False) as lm:
        with pytest.raises(
            RequestError, match="prompt 1 has 30 ids and 19 more are requested: 49 exceed the 48"
        ):
            lm.generate(rows, [43, 19])
        assert lm.generate(rows, [43, 18], stop=()).shape == (2, 73)


@settings(max_examples=15)
@given(
    times=st.lists(st.integers(1, TOKENS), min_size=1, max_size=24),
    size=st.integers(1, 4),
    batches=st.integers(1, 4),
    chunk=st.sampled_from([0, 3]),
)
def test_predictions_assume_the_passes_of_a_run(
    times: list[int], size: int, batches: int, chunk: int, tiny: Any, prompts: Any
) -> None:
    rows = prompts([5] * len(times))
    policy = Policy(gpu_batch_size=size, num_gpu_batches=batches, prefill_chunk=chunk)
    passes = list(refilled_passes(times, policy, Passes(5, chunk)))
    with OptLM(tiny(NAME).directory, policy, device="cpu", progress=False) as lm:
        lm.generate(rows, times, stop=())
        assert lm.stats is not None
        timing = lm.stats.timing
    computed = [
        event.step.batch
        for event in timing.trace.events
        if event.step.op is Op.COMPUTE and event.step.layer == 1
    ]
    assert computed == [batch for one in passes for batch in range(len(one.rows))]
    for stage in Stage:
        some = [one for one in passes if one.stage is stage]
        _, new, places = timing.stages.get(stage, (0.0, 0, 0))
        assert new == sum(one.live for one in some)
        assert places == len(some) * min(policy.block_size, len(times))
