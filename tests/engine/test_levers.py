"""What saves passes and bytes never changes the text: shared prefixes, entering prompts, stops and guesses together.

A normal run draws few cases. `--hypothesis-profile=explore` draws 200 on each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.policy import Policy
from flexgen.runtime.choice import Choice, Limited, Sampled
from flexgen.runtime.guesses import Propose, copied
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
OPT, WINDOW = "opt", "gemma2, every other layer with a window"
NAMES = [OPT, WINDOW, "llama gqa 2", "mistral with a window"]
TOKENS, PAD, VOCAB = 9, 1, 64
ROOT, DOCUMENT = 33, 34
"""Numbers of ids that prompts share. Shorter prefixes are not shared. OPT has 48 positions, the others any number."""
IN_MEMORY = [{"gpu": 100}, {"cpu": 100}, {"gpu": 50, "cpu": 50}]
SPLITS = [*IN_MEMORY, {"disk": 100}, {"gpu": 34, "cpu": 33, "disk": 33}]


def cases(few: int) -> int:
    return 200 if settings.get_current_profile_name() == "explore" else few


@pytest.fixture(autouse=True)
def _every_group_is_worth_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.engine.calls._PASS_IN_PLACE", 0)
    monkeypatch.setattr("flexgen.engine.calls._PASS_THAT_LOADS", 0)


@st.composite
def prompts_of(draw: st.DrawFn, name: str) -> list[list[int]]:
    """Prompts of different lengths. They may begin with a common text, and some of them with a document after it."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))

    def text(count: int) -> list[int]:
        return rng.integers(PAD + 1, VOCAB, count).tolist()

    root = text(draw(st.sampled_from([0, 0, ROOT])))
    documents = [[], text(DOCUMENT), text(DOCUMENT)] if root and name != OPT else [[]]
    most = 5 if root else 12
    own = draw(st.lists(st.integers(1, most), min_size=1, max_size=12))
    return [root + draw(st.sampled_from(documents)) + text(count) for count in own]


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    guess = draw(st.sampled_from([0, 0, 1, 4, 8]))
    prefill_rows = 0 if guess else draw(st.sampled_from([0, 1, 2, 3, 5]))
    return Policy(
        gpu_batch_size=draw(st.integers(1, 4)),
        num_gpu_batches=draw(st.integers(1, 4)),
        weights=draw(st.sampled_from(SPLITS)),
        cache=draw(st.sampled_from(IN_MEMORY if guess or prefill_rows else SPLITS)),
        activations={"gpu": 100} if prefill_rows else draw(st.sampled_from(SPLITS)),
        attend_on=draw(st.sampled_from(["cpu", "gpu"])),
        overlap=draw(st.booleans()),
        sep_layer=draw(st.booleans()),
        prefill_chunk=draw(st.sampled_from([0, 0, 3])),
        prefill_rows=prefill_rows,
        guess=guess,
    )


orders = st.none() | st.sampled_from(sorted(ORDERS))


def proposer(kind: str, texts: Sequence[np.ndarray]) -> Propose:
    """Guesses that are all right, also past a stop; all wrong; or those of the engine. texts: without stops."""
    if kind == "copied":
        return copied

    def propose(ids: np.ndarray, count: int) -> list[int]:
        text = next(text for text in texts if np.array_equal(text[: len(ids)], ids[: len(text)]))
        right = text[len(ids) : len(ids) + count]
        return right.tolist() if kind == "right" else ((right + 1) % VOCAB).tolist()

    return propose


def ended(ids: np.ndarray, width: int, times: Sequence[int], stops: Sequence[int]) -> np.ndarray:
    """The ids of a call without stops, with pad ids after the end of each row."""
    ids = ids.copy()
    for row, time in zip(ids, times, strict=True):
        new = row[width:]
        at = np.flatnonzero(np.isin(new, stops))
        new[min([time, *(at[:1] + 1)]) :] = PAD
    return ids


def completed(lm: OptLM, rows: Any, choice: Choice, propose: Propose = copied) -> np.ndarray:
    return lm.generate_with(Completion(read_request(lm.spec, rows), TOKENS, choice, pad=PAD, propose=propose))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=cases(50))
@given(data=st.data(), policy=policies(), order=orders, page=st.integers(1, 6))
def test_ids_are_those_of_transformers(
    device: str, data: st.DataObject, policy: Policy, order: str | None, page: int, tiny: Any
) -> None:
    """All rows of the reference run together, to the last token, without a shared prefix and without guesses."""
    name = data.draw(st.sampled_from(NAMES))
    model, rows = tiny(name), data.draw(prompts_of(name))
    times = data.draw(st.lists(st.integers(1, TOKENS), min_size=len(rows), max_size=len(rows)))
    free, width = model.greedy(rows, TOKENS), max(map(len, rows))
    seen = sorted(set(free[:, width:].ravel().tolist()))
    stops = data.draw(st.lists(st.sampled_from(seen), max_size=2))
    texts = [text[width - len(row) :] for text, row in zip(free, rows, strict=True)]
    propose = proposer(data.draw(st.sampled_from(["right", "wrong", "copied"])), texts)
    with (
        piece_sizes(page_tokens=page, memory_page_tokens=page),
        OptLM(model.directory, policy, device=device, dtype="float32", order=order, progress=False) as lm,
    ):
        ids = completed(lm, rows, Limited(Sampled(stop_ids=stops), times), propose)
        np.testing.assert_array_equal(ids, ended(free, width, times, stops))
        assert lm._machine.disk.used == 0, "a file of the call is left"


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=cases(20))
@given(data=st.data(), policy=policies(), order=orders, seed=st.integers(0, 99))
def test_samples_depend_on_nothing_but_their_numbers(
    device: str, data: st.DataObject, policy: Policy, order: str | None, seed: int, tiny: Any
) -> None:
    """Not on the policy, the order, the guesses or the other prompts: some of the prompts get the same samples."""
    name = data.draw(st.sampled_from(NAMES))
    model, rows = tiny(name), data.draw(prompts_of(name))
    numbers = range(len(rows))
    times = data.draw(st.lists(st.integers(1, TOKENS), min_size=len(rows), max_size=len(rows)))
    some = data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=len(rows), unique=True))

    def samples(policy: Policy, order: str | None, of: Sequence[int]) -> list[np.ndarray]:
        own = [rows[n] for n in of]
        choice = Limited(Sampled(1.1, top_p=0.9, seed=seed, first_row=list(of)), [times[n] for n in of])
        with OptLM(
            model.directory, policy, device=device, dtype="float32", order=order, progress=False
        ) as lm:
            return list(completed(lm, own, choice)[:, max(map(len, own)) :])

    plain = samples(Policy(gpu_batch_size=len(rows), share_prefix=False), None, numbers)
    np.testing.assert_array_equal(samples(policy, order, numbers), plain)
    np.testing.assert_array_equal(samples(policy, order, some), [plain[n] for n in some])
