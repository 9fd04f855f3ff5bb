"""A tree of prefixes: groups of prompts share more than all do, and the ids are those of prompts that run whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flexgen.engine import OptLM
from flexgen.policy import Policy, Tier
from flexgen.schedule.orders import ORDERS
from flexgen.workload import Workload

LLAMA, WINDOW = "llama gqa 2", "gemma2, every other layer with a window"
TOKENS = 6
PLACES = [("cpu", "cpu"), ("emulated", "cpu"), ("emulated", "gpu")]
"""Devices, and what attends to cache that is not on the device."""
ON_GPU = [pytest.param("cuda", attend_on, marks=pytest.mark.gpu) for attend_on in ("cpu", "gpu")]
ROOT, DOCUMENT, SECTION = 34, 35, 33
TREE = [
    (0, 0, 3),
    (1, 0, 2),
    (0, 1, 5),
    (None, 0, 4),
    (0, 0, 1),
    (1, 0, 3),
    (0, 1, 2),
    (2, None, 2),
    (2, None, 6),
]
"""The document of each prompt, its section, and the number of ids of its question."""

Shape = Sequence[tuple[int | None, int | None, int]]


def prompts_of(shape: Shape, root: int = ROOT, seed: int = 0) -> list[list[int]]:
    """Prompts that begin with `root` common ids, those of a document and those of one of its sections."""
    rng = np.random.default_rng(seed)
    ids = lambda count: rng.integers(2, 60, count).tolist()  # noqa: E731
    common, texts = ids(root), {}
    rows = []
    for document, section, own in shape:
        row = list(common)
        for key, length in ((document, DOCUMENT), ((document, section), SECTION)):
            if document is None or (isinstance(key, tuple) and section is None):
                continue
            row += texts.setdefault(key, ids(length))
        rows.append(row + ids(own))
    return rows


@pytest.fixture(autouse=True)
def _every_group_is_worth_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.engine.calls._PASS_IN_PLACE", 0)
    monkeypatch.setattr("flexgen.engine.calls._PASS_THAT_LOADS", 0)


@pytest.fixture(scope="module")
def whole(tiny: Any, without_sharing: Any) -> Any:
    return lambda name, rows, stop=(): without_sharing(tiny(name).directory, rows, TOKENS, stop)


@pytest.fixture
def opened(tiny: Any) -> Iterator[Any]:
    """Opens models, and checks at the end that their calls have freed all that they took."""
    models: list[tuple[OptLM, dict[Tier, int]]] = []

    def open_one(name: str, policy: Policy, **options: Any) -> OptLM:
        lm = OptLM(tiny(name).directory, policy, dtype="float32", progress=False, **options)
        models.append((lm, lm.memory_in_use()))
        return lm

    yield open_one
    for lm, before in models:
        assert lm.memory_in_use() == before
        lm.close()


@pytest.mark.parametrize("cache", [{"gpu": 100}, {"cpu": 100}, {"disk": 100}], ids=str)
@pytest.mark.parametrize(("device", "attend_on"), [*PLACES, *ON_GPU])
@pytest.mark.parametrize("name", [LLAMA, WINDOW])
def test_ids_are_those_of_whole_prompts(
    name: str, device: str, attend_on: str, cache: dict[str, float], opened: Any, whole: Any, mixed: Any
) -> None:
    rows = prompts_of(TREE)
    lm = opened(name, mixed(cache=cache, attend_on=attend_on), device=device)
    np.testing.assert_array_equal(lm.generate(rows, TOKENS, stop=()), whole(name, rows))
    assert (lm.stats.prefix, lm.stats.groups) == (ROOT, 5)
    # The instruction is computed once, as are three documents and the two sections that several prompts have.
    shared = ROOT * len(TREE) + DOCUMENT * 8 + SECTION * 6
    once = ROOT + 3 * DOCUMENT + 3 * SECTION
    assert lm.stats.reused == shared - once


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shape=st.lists(
        st.tuples(st.sampled_from([None, 0, 1, 2]), st.sampled_from([None, 0, 1]), st.integers(1, 6)),
        min_size=1,
        max_size=10,
    ),
    root=st.sampled_from([0, 5, ROOT]),
    name=st.sampled_from([LLAMA, WINDOW]),
    place=st.sampled_from(PLACES),
    cache=st.sampled_from([{"gpu": 100}, {"cpu": 60, "disk": 40}, {"gpu": 34, "cpu": 33, "disk": 33}]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    batch=st.integers(1, 3),
    chunk=st.sampled_from([0, 0, 7]),
    stops=st.booleans(),
    seed=st.integers(0, 3),
)
@example(
    shape=TREE,
    root=ROOT,
    name=LLAMA,
    place=("emulated", "cpu"),
    cache={"cpu": 60, "disk": 40},
    order=None,
    batch=2,
    chunk=7,
    stops=True,
    seed=0,
)
@example(
    shape=[(0, None, 1)] * 3 + [(1, 1, 2)] * 3, root=5, name=WINDOW, place=("emulated", "gpu"),
    cache={"gpu": 34, "cpu": 66}, order=None, batch=1, chunk=0, stops=False, seed=1,
)  # fmt: skip
def test_random_trees(shape, root, name, place, cache, order, batch, chunk, stops, seed, tiny, whole, mixed):
    """Ids, and ids of rows that stop, for trees of prompts under any policy."""
    rows = prompts_of(shape, root, seed)
    if root == 0 and shape[0][0] is None:
        rows = [row or [3] for row in rows]
    device, attend_on = place
    policy = mixed(
        cache=cache, attend_on=attend_on, gpu_batch_size=batch, prefill_chunk=chunk, weights={"cpu": 100}
    )
    stop = np.unique(whole(name, rows)[:, -TOKENS:])[::5].tolist() if stops else []
    with OptLM(
        tiny(name).directory, policy, device=device, order=order, dtype="float32", progress=False
    ) as lm:
        before = lm.memory_in_use()
        np.testing.assert_array_equal(lm.generate(rows, TOKENS, stop=stop), whole(name, rows, stop))
        assert lm.memory_in_use() == before


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_samples_streams_scores_and_logits(device: str, tiny: Any, mixed: Any) -> None:
    rows, found = prompts_of(TREE), []
    for share in (True, False):
        policy = mixed(share_prefix=share)
        with OptLM(tiny(LLAMA).directory, policy, device=device, dtype="float32", progress=False) as lm:
            streamed = dict(lm.stream(rows, TOKENS, stop=()))
            drawn = lm.generate(rows, TOKENS, do_sample=True, seed=3, stop=())
            logits = lm.forward(rows)
            assert lm.stats is not None and lm.stats.groups == (5 if share else 1)
            found.append(([streamed[n] for n in range(len(rows))], drawn, logits, torch.cat(lm.score(rows))))
    (texts, drawn, logits, scores), (others, also_drawn, other_logits, other_scores) = found
    np.testing.assert_array_equal(np.stack(texts), np.stack(others))
    np.testing.assert_array_equal(drawn, also_drawn)
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(scores, other_scores, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cache", [{"gpu": 100}, {"cpu": 100}, {"gpu": 34, "cpu": 33, "disk": 33}], ids=str)
@pytest.mark.parametrize(("device", "attend_on"), PLACES)
def test_a_call_takes_at_most_what_was_planned(
    cache: dict[str, float], device: str, attend_on: str, opened: Any, mixed: Any
) -> None:
    lm = opened(WINDOW, mixed(cache=cache, attend_on=attend_on), device=device)
    lm.generate(prompts_of(TREE), TOKENS, stop=())
    assert lm.stats.groups == 5
    plan, machine = lm.stats.plan, lm._machine
    fixed = {
        tier: sum(n.nbytes for n in plan.needs if n.tier is tier and n.role != "workspace") for tier in Tier
    }
    assert fixed[Tier.CPU] - machine.host.peak > -8 * 1024  # without ids
    assert machine.disk.peak <= fixed[Tier.DISK] - plan.on(Tier.DISK, "weights")
    if device == "emulated":
        assert machine.device.memory.peak <= fixed[Tier.GPU]


def test_groups_that_do_not_fit_are_not_made(tiny: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts are one group then, with the prefix of all."""
    rows = prompts_of(TREE)
    monkeypatch.setattr(
        "flexgen.engine.calls.covering",
        lambda groups, request, gen_len: [Workload(1 << 40, gen_len, len(rows))],
    )
    with OptLM(tiny(LLAMA).directory, mixed(), device="emulated", progress=False) as lm:
        lm.generate(rows, 2, stop=())
        assert lm.stats is not None and (lm.stats.prefix, lm.stats.groups) == (ROOT, 1)


@pytest.mark.parametrize("fields", [{"share_prefix": False}, {"attn_sparsity": 0.5}], ids=str)
def test_policies_that_share_nothing(fields: dict[str, Any], tiny: Any, mixed: Any) -> None:
    with OptLM(tiny(LLAMA).directory, mixed(**fields), progress=False) as lm:
        lm.generate(prompts_of(TREE), 2, stop=())
        assert lm.stats is not None and (lm.stats.prefix, lm.stats.groups, lm.stats.reused) == (0, 1, 0)


def test_few_prompts_are_not_worth_passes_over_streamed_weights(
    tiny: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with OptLM(tiny(LLAMA).directory, mixed(), device="emulated", progress=False) as lm:
        lm.generate(prompts_of(TREE), 2, stop=())
        assert lm.stats is not None and (lm.stats.prefix, lm.stats.groups) == (ROOT, 1)


def test_the_report_has_the_groups(opened: Any, mixed: Any) -> None:
    rows = prompts_of(TREE)
    lm = opened(LLAMA, mixed(), device="emulated")
    _, report = lm.generate(rows, TOKENS, stop=(), stats=True)
    assert (report.prefix, report.prefix_groups) == (ROOT, 5)
    saved = f"{report.reused_tokens / sum(map(len, rows)):.0%} of the prompts' tokens were not computed again"
    assert f"prefix       {ROOT} tokens of all prompts, and more in 5 groups: {saved}" in report.card()
    lanes = lm.lane_seconds(rows, TOKENS)
    assert all(seconds > 0 for phase in lanes.values() for seconds in phase.values())
