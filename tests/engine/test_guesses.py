"""Guesses of the next tokens: whatever is guessed, the ids are those of a policy without guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.errors import PolicyError
from flexgen.policy import Policy, Tier
from flexgen.runtime.choice import Limited, NewIds, Sampled
from flexgen.runtime.guesses import Propose, copied
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op

LLAMA, OPT, WINDOW = "llama gqa 2", "opt", "gemma2, every other layer with a window"
LENGTHS = [5, 3, 9, 2, 7, 4, 6]
TOKENS = 12
PAD = 1
PLACES = [("cpu", "cpu"), ("emulated", "cpu"), ("emulated", "gpu")]
"""Devices, and what attends to cache that is not on the device. A CPU attends to all of it."""
ON_GPU = [pytest.param("cuda", attend_on, marks=pytest.mark.gpu) for attend_on in ("cpu", "gpu")]
SPLITS = [{"gpu": 100}, {"cpu": 100}, {"gpu": 50, "cpu": 50}]


def completed(lm: OptLM, rows: Any, choice: Any, propose: Propose = copied, **options: Any) -> np.ndarray:
    request = read_request(lm.spec, rows)
    return lm.generate_with(Completion(request, TOKENS, choice, pad=PAD, propose=propose), **options)


def oracle(texts: Sequence[np.ndarray], wrong: Callable[[int], bool]) -> Propose:
    """Guesses with the ids of `texts`, which begin with different prompts, but a wrong id where `wrong(number)`."""

    def propose(ids: np.ndarray, count: int) -> list[int]:
        text = next(text for text in texts if np.array_equal(text[: len(ids)], ids[: len(text)]))
        right = text[len(ids) : len(ids) + count]
        return [(int(id) + 1) % 60 if wrong(len(ids) + n) else int(id) for n, id in enumerate(right)]

    return propose


def unpadded(out: np.ndarray, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    width = max(map(len, rows))
    return [text[width - len(row) :] for text, row in zip(out, rows, strict=True)]


PROPOSERS = {
    "none": lambda texts: lambda ids, count: [],
    "all right": lambda texts: oracle(texts, lambda n: False),
    "all wrong": lambda texts: oracle(texts, lambda n: True),
    "each third wrong": lambda texts: oracle(texts, lambda n: n % 3 == 0),
    "too many": lambda texts: lambda ids, count: [1] * (count + 5),
    "copied": lambda texts: copied,
}


@pytest.mark.parametrize(("cache", "guess"), list(zip(SPLITS, [1, 8, 4], strict=True)), ids=str)
@pytest.mark.parametrize(("device", "attend_on"), [*PLACES, *ON_GPU])
@pytest.mark.parametrize("name", [LLAMA, OPT, WINDOW])
def test_ids_are_those_of_transformers(
    name: str, device: str, attend_on: str, cache: Any, guess: int, tiny: Any, prompts: Any, mixed: Any
) -> None:
    model, rows = tiny(name), prompts(LENGTHS)
    expected = model.greedy(rows, TOKENS)
    texts = unpadded(expected, rows)
    policy = mixed(cache=cache, attend_on=attend_on, guess=guess)
    # What a device changes are the cells and their order, whatever the guesses are.
    proposers = PROPOSERS if device == "cpu" else ("none", "all right", "each third wrong")
    with OptLM(model.directory, policy, device=device, dtype="float32", progress=False) as lm:
        for proposer in proposers:
            made = PROPOSERS[proposer](texts)
            np.testing.assert_array_equal(completed(lm, rows, Sampled(), made), expected)


@pytest.mark.parametrize("cache", SPLITS, ids=str)
@pytest.mark.parametrize(("device", "attend_on"), [*PLACES, *ON_GPU])
@pytest.mark.parametrize("name", [LLAMA, OPT])
def test_few_rows_have_not_ended(
    name: str, device: str, attend_on: str, cache: Any, tiny: Any, prompts: Any, mixed: Any
) -> None:
    """Two rows of different batches are left, with prompts and numbers of new tokens of their own."""
    model, rows = tiny(name), prompts([5, 3, 9, 2, 7, 4])
    expected = model.greedy(rows, TOKENS)
    texts, times = unpadded(expected, rows), [12, 2, 2, 12, 3, 2]
    for row, time in zip(expected, times, strict=True):
        row[9 + time :] = PAD
    policy = mixed(cache=cache, attend_on=attend_on, guess=2, gpu_batch_size=2, num_gpu_batches=3)
    with OptLM(model.directory, policy, device=device, dtype="float32", progress=False) as lm:
        for proposer in ("each third wrong", "none"):
            made = PROPOSERS[proposer](texts)
            out = completed(lm, rows, Limited(Sampled(), times), made)
            np.testing.assert_array_equal(out, expected)
            assert lm.stats is not None
            steps = [event.step for event in lm.stats.timing.trace.events if event.step.op is Op.COMPUTE]
            last = max(step.token for step in steps)
            if device == "cpu":  # other devices have issued steps of the next pass by then
                # With right guesses, two rows of different batches are left at once. They move together.
                most = 1 if proposer == "each third wrong" else 2
                assert len({step.batch for step in steps if step.token == last}) <= most


@pytest.mark.parametrize(("device", "attend_on"), [*PLACES, *ON_GPU])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_every_order(order: str, device: str, attend_on: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    """Prompts enter where rows have ended and others have moved, also with stops inside guesses that are kept."""
    model, rows = tiny(LLAMA), prompts(LENGTHS * 2)
    free = model.greedy(rows, TOKENS)
    times = [3, 12, 7, 1, 9, 4, 12, 2, 5, 12, 8, 6, 1, 10]
    expected = free.copy()
    for row, time in zip(expected, times, strict=True):
        row[max(LENGTHS) + time :] = PAD
    policy = mixed(
        cache={"cpu": 60, "gpu": 40}, attend_on=attend_on, guess=4, gpu_batch_size=2, num_gpu_batches=3
    )
    texts = unpadded(free, rows)
    with OptLM(model.directory, policy, device=device, order=order, progress=False) as lm:
        for name in ("all right", "each third wrong"):
            heard: dict[int, list[int]] = {}

            def listen(new: NewIds, heard: dict[int, list[int]] = heard) -> None:
                for row, id, live in zip(new.rows, new.ids.tolist(), new.live.tolist(), strict=True):
                    if live:
                        assert len(heard.setdefault(row, [])) == new.token
                        heard[row].append(id)

            out = completed(lm, rows, Limited(Sampled(), times), PROPOSERS[name](texts), listeners=[listen])
            np.testing.assert_array_equal(out, expected)
            width = max(LENGTHS)
            assert [heard[n] for n in range(len(rows))] == [
                text[width : width + time].tolist() for text, time in zip(free, times, strict=True)
            ]
            assert lm.stats is not None and lm.stats.new_tokens == sum(times)


@settings(max_examples=60)
@given(
    guess=st.sampled_from([1, 4, 8]),
    proposer=st.sampled_from(sorted(PROPOSERS)),
    place=st.sampled_from(PLACES),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    cache=st.sampled_from(SPLITS),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans()),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 1.0]),
    times=st.none() | st.lists(st.integers(1, TOKENS), min_size=9, max_size=9),
    seed=st.integers(0, 999),
    chunk=st.sampled_from([0, 3]),
)
@example(
    guess=4,
    proposer="all right",
    place=("cpu", "cpu"),
    order=None,
    cache=SPLITS[0],
    shape=(1, 1, True),
    lengths=[5],
    temperature=1.0,
    times=[7] * 9,
    seed=0,
    chunk=0,
)
def test_ids_do_not_depend_on_guesses(
    guess: int,
    proposer: str,
    place: tuple[str, str],
    order: str | None,
    cache: Any,
    shape: tuple[int, int, bool],
    lengths: list[int],
    temperature: float,
    times: list[int] | None,
    seed: int,
    chunk: int,
    tiny: Any,
    prompts: Any,
) -> None:
    model, rows = tiny(LLAMA), prompts(lengths, seed)
    size, batches, sep_layer = shape
    policy = Policy(
        gpu_batch_size=size,
        num_gpu_batches=batches,
        weights={"gpu": 50, "cpu": 50},
        cache=cache,
        activations={"gpu": 40, "cpu": 60},
        attend_on=place[1],
        sep_layer=sep_layer,
        prefill_chunk=chunk,
    )

    def choice() -> Sampled:
        return (
            Sampled(temperature, seed=seed)
            if times is None
            else Limited(Sampled(temperature, seed=seed), times)
        )

    with piece_sizes(page_tokens=4, memory_page_tokens=4):
        with OptLM(model.directory, policy, device=place[0], order=order, progress=False) as lm:
            expected = completed(lm, rows, choice())
            texts = unpadded(completed(lm, rows, Sampled(temperature, seed=seed)), rows)
        guessing = policy.replace(guess=guess)
        with OptLM(model.directory, guessing, device=place[0], order=order, progress=False) as lm:
            made = PROPOSERS[proposer](texts)
            np.testing.assert_array_equal(completed(lm, rows, choice(), made), expected)


def sharing(own: Sequence[int]) -> list[list[int]]:
    """Prompts that begin with 33 equal ids."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(2, 60, 33).tolist()
    return [[*prefix, 2 + n, *rng.integers(2, 60, more - 1).tolist()] for n, more in enumerate(own)]


@pytest.mark.parametrize(("device", "attend_on"), PLACES)
@pytest.mark.parametrize("name", [LLAMA, WINDOW])
def test_with_a_shared_prefix(name: str, device: str, attend_on: str, tiny: Any, mixed: Any) -> None:
    """Guesses come from the prefix too. The last positions of the model are used."""
    model, rows = tiny(name), sharing([3, 1, 2, 3, 1])
    policy = mixed(cache={"gpu": 40, "cpu": 60}, attend_on=attend_on, guess=4)
    expected = model.greedy(rows, TOKENS)
    with OptLM(model.directory, policy, device=device, dtype="float32", progress=False) as lm:
        for proposer in ("all right", "each third wrong", "copied"):
            made = PROPOSERS[proposer](unpadded(expected, rows))
            np.testing.assert_array_equal(completed(lm, rows, Sampled(), made), expected)
            assert lm.stats is not None and lm.stats.prefix == 33


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(("device", "attend_on"), PLACES)
def test_an_encoded_cache(
    codec: str, device: str, attend_on: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    """Keys and values are encoded token by token, so a guess that is kept is what it would have been."""
    rows = prompts(LENGTHS)
    cache = {tier: dict(percent=50, codec=codec) for tier in ("gpu", "cpu")}
    policy, directory = mixed(cache=cache, attend_on=attend_on), tiny(LLAMA).directory
    with OptLM(directory, policy, device=device, dtype="float32", progress=False) as lm:
        expected = completed(lm, rows, Sampled())
    with OptLM(directory, policy.replace(guess=4), device=device, dtype="float32", progress=False) as lm:
        made = PROPOSERS["each third wrong"](unpadded(expected, rows))
        np.testing.assert_array_equal(completed(lm, rows, Sampled(), made), expected)


def test_passes_and_report(tiny: Any, prompts: Any, mixed: Any) -> None:
    """With right guesses, 12 tokens take the prefill and passes of 5, 5 and 1. Wrong ones are soon left out."""
    model, rows = tiny(LLAMA), prompts([4, 4, 4])
    expected = model.greedy(rows, TOKENS)
    policy = mixed(cache={"cpu": 100}, guess=4)
    with OptLM(model.directory, policy, device="cpu", dtype="float32", progress=False) as lm:
        request = read_request(lm.spec, rows)
        completed(lm, rows, Sampled(), PROPOSERS["all right"](unpadded(expected, rows)))
        assert lm.stats is not None and lm.stats.timing.ran == [4]
        report = lm.last_report(request, TOKENS, TOKENS)
        assert (report.guesses_made, report.guesses_kept) == (3 * 8, 3 * 8)
        assert report.copied == 11 / 3
        assert "3.67 tokens accepted a pass: 24 of 24 guesses were right" in report.card()
        completed(lm, rows, Sampled(), PROPOSERS["all wrong"](unpadded(expected, rows)))
        assert lm.stats.timing.ran == [12]
        report = lm.last_report(request, TOKENS, TOKENS)
        assert report.guesses_kept == 0 and report.copied == 1 and 0 < report.guesses_made < 3 * 4 * 11
        completed(lm, rows, Sampled(), PROPOSERS["none"](unpadded(expected, rows)))
        assert "guesses" not in lm.last_report(request, TOKENS, TOKENS).card()


@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
def test_a_call_takes_what_was_planned(attend_on: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, rows = tiny(LLAMA), prompts([5, 4, 3, 2])
    policy = mixed(
        cache={"gpu": 50, "cpu": 50}, attend_on=attend_on, guess=8, gpu_batch_size=2, num_gpu_batches=2
    )
    with OptLM(model.directory, policy, device="emulated", dtype="float32", progress=False) as lm:
        most = dict.fromkeys(Tier, 0)

        def look() -> None:
            for tier, count in lm.memory_in_use().items():
                most[tier] = max(most[tier], count)

        before = lm.memory_in_use()
        completed(lm, rows, Sampled(), check=look)
        assert lm.memory_in_use() == before
        assert lm.stats is not None
        for tier in Tier:
            assert most[tier] <= lm.stats.plan.on(tier)


def test_calls_that_make_no_guesses(tiny: Any, prompts: Any, mixed: Any) -> None:
    """A choice that depends on the ids so far, and a call that is cut: nothing is guessed."""
    model, rows = tiny(LLAMA), prompts([5, 3])

    class Reads(Sampled):
        by_logits = False

    with OptLM(model.directory, mixed(cache={"cpu": 100}, guess=4), device="cpu", progress=False) as lm:
        expected = model.greedy(rows, TOKENS)
        np.testing.assert_array_equal(completed(lm, rows, Reads()), expected)
        assert lm.stats is not None and lm.stats.timing.guesses_made == 0
        made = PROPOSERS["too many"]([])
        cut = Completion(read_request(lm.spec, rows), TOKENS, Sampled(), tokens=4, pad=PAD, propose=made)
        out = lm.generate_with(cut)
        assert lm.stats.timing.guesses_made == 0
        np.testing.assert_array_equal(out[:, : 5 + 4], expected[:, : 5 + 4])
        np.testing.assert_array_equal(completed(lm, rows, Sampled(), made), expected)
        assert lm.stats.timing.guesses_made > 0


def test_batches_that_are_too_large(tiny: Any) -> None:
    policy = Policy(gpu_batch_size=1000, guess=4)
    message = (
        r"guess is 4 with gpu_batch_size = 1000: a pass of the decode has up to 5000 tokens, and .* computes at most "
        "4096 at once; lower one of the two"
    )
    with pytest.raises(PolicyError, match=message):
        OptLM(tiny(LLAMA).directory, policy, device="cpu", progress=False)
