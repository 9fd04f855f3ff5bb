"""A model whose layers differ in heads, head sizes, MLPs, norms and RoPE: under every policy the ids are those of the
model as it is defined, and what a call takes is what was planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexgen.engine.model import OptLM
from flexgen.models import build_layers
from flexgen.models.families import spec_from_config
from flexgen.policy import Policy, Tier
from flexgen.schedule.orders import ORDERS

MODELS = {
    "alternating": ("wide", "narrow", "wide", "narrow"),
    "all kinds": ("narrow", "wide", "post-norm", "other rope", "narrow"),
    "one unlike the others": ("wide", "wide", "other rope", "wide"),
}
SPLITS = st.sampled_from(
    [{"gpu": 100}, {"cpu": 100}, {"disk": 100}, {"gpu": 34, "cpu": 33, "disk": 33}, {"gpu": 25, "disk": 75}]
)
POLICIES = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 4),
    num_gpu_batches=st.integers(1, 4),
    weights=SPLITS,
    cache=SPLITS,
    activations=SPLITS,
    attend_on=st.sampled_from(["cpu", "gpu"]),
    overlap=st.booleans(),
    sep_layer=st.booleans(),
)


class Model:
    """Random weights in a file, and the reference's answers."""

    def __init__(self, uneven: Any, name: str, directory: Any) -> None:
        self.uneven, self.directory = uneven, directory / name.replace(" ", "-")
        self.config = uneven.UnevenConfig(MODELS[name])
        self.spec = spec_from_config(self.config, name)
        generator = torch.Generator().manual_seed(0)
        weights = {weight.key: weight for layer in build_layers(self.spec) for weight in layer.weights}
        self.tensors = {
            key: torch.randn(weight.shape, generator=generator) * 0.3 + ("norm.weight" in key)
            for key, weight in weights.items()
        }
        self.directory.mkdir()
        save_file(self.tensors, self.directory / "model.safetensors")
        self._next: dict[tuple[int, ...], int] = {}

    def open(self, policy: Policy, **options: Any) -> OptLM:
        return OptLM(self.config, policy, weights=self.directory, progress=False, **options)

    def greedy(self, prompts: list[list[int]], tokens: int) -> np.ndarray:
        rows = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(tokens):
                if (key := tuple(ids)) not in self._next:
                    logits = self.uneven.logits_of(self.spec, self.tensors, ids)[-1]
                    self._next[key] = int(logits.argmax())
                ids.append(self._next[key])
            rows.append([1] * (max(map(len, prompts)) - len(prompt)) + ids)
        return np.array(rows)


@pytest.fixture(scope="module")
def models(uneven: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    directory = tmp_path_factory.mktemp("uneven")
    return {name: Model(uneven, name, directory) for name in MODELS}


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(MODELS)),
    policy=POLICIES,
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    seed=st.integers(0, 20),
    tokens=st.integers(1, 9),
)
def test_greedy_ids(
    name: str,
    policy: Policy,
    device: str,
    order: str | None,
    lengths: list[int],
    seed: int,
    tokens: int,
    models: Any,
    prompts: Any,
) -> None:
    model, rows = models[name], prompts(lengths, seed)
    with model.open(policy, device=device, order=order) as lm:
        np.testing.assert_array_equal(lm.generate(rows, tokens, stop=()), model.greedy(rows, tokens))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_prompt(name: str, models: Any, prompts: Any, mixed: Any) -> None:
    model, rows = models[name], prompts([14] * 5)
    for sep_layer in (True, False):
        with model.open(mixed(sep_layer=sep_layer), device="emulated") as lm:
            ours = lm.forward(torch.tensor(rows))
        for row, ids in enumerate(rows):
            theirs = model.uneven.logits_of(model.spec, model.tensors, ids)
            torch.testing.assert_close(ours[row].double(), theirs, rtol=0, atol=1e-3)


def test_rows_that_stop_leave_caches_of_different_shapes(models: Any, prompts: Any, mixed: Any) -> None:
    """Most rows end at once; the others move together, in each layer as it keeps them."""
    model, rows = models["all kinds"], prompts([5, 9, 3, 7, 6, 8])
    free = model.greedy(rows, 12)
    new = free[:, 9:]
    stop = np.unique(new[:4, 0]).tolist()
    expected = free.copy()
    for row in expected:
        hits = np.flatnonzero(np.isin(row[9:], stop))
        if len(hits):
            row[9 + hits[0] + 1 :] = 1
    assert 0 < (~np.isin(new[:, :4], stop)).all(1).sum() <= 2, "none stays, or too many for a move"
    for device in ("cpu", "emulated"):
        with model.open(mixed(), device=device) as lm:
            np.testing.assert_array_equal(lm.generate(rows, 12, stop=stop), expected)


@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("name", MODELS)
def test_a_call_takes_what_was_planned(
    name: str, device: str, attend_on: str, models: Any, prompts: Any, mixed: Any
) -> None:
    """The peaks of all stores are what the plan says, but for ids and for what is rounded up to whole blocks."""
    with models[name].open(mixed(gpu_batch_size=12, attend_on=attend_on), device=device) as lm:
        lm.generate(prompts([9] * 18), 6, stop=())
        plan, machine = lm.stats.plan, lm._machine
        fixed = {
            tier: sum(n.nbytes for n in plan.needs if n.tier is tier and n.role != "workspace")
            for tier in Tier
        }
        rounded = 64 * 1024
        assert 0 <= fixed[Tier.CPU] - machine.host.peak < rounded
        assert machine.disk.peak == fixed[Tier.DISK] - plan.on(Tier.DISK, "weights") > 0
        if device == "emulated":
            assert 0 <= fixed[Tier.GPU] - machine.device.memory.peak < rounded
