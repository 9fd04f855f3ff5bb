"""Hidden states between layers come back as they were, from whatever tier they waited on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.layout.cache import Span
from flexgen.layout.hidden import hidden_layout
from flexgen.policy import Policy, Tier
from flexgen.runtime.activations import Activations
from flexgen.runtime.cell import BoundCell, Padding

SPLITS = [
    {"gpu": 100},
    {"cpu": 100},
    {"disk": 100},
    {"gpu": 34, "cpu": 33, "disk": 33},
    {"gpu": 50, "cpu": 50},
    {"cpu": 50, "disk": 50},
    {"gpu": 30, "disk": 70},
]
DTYPES = [torch.float32, torch.bfloat16]


def cell_of(batch: int, slot: int, tokens: int) -> BoundCell:
    return BoundCell(0, 1, batch, slot, Span(0, tokens), Padding((), torch.empty(0), torch.empty(0)))


def assert_round_trips(
    device: str,
    split: dict[str, int],
    batches: list[int],
    prompt: int,
    visits: list[int],
    dtype: torch.dtype,
    machine: Any,
    run: Any,
    spec: Any,
) -> None:
    """Each visit keeps hidden states of `tokens` tokens of every batch; the next one must find them."""
    generator = torch.Generator().manual_seed(0)
    with machine(device) as m:
        policy, topology = Policy(activations=split), m.device.topology
        layouts = [hidden_layout(spec, policy, rows, dtype, topology) for rows in batches]
        activations = Activations(layouts, prompt, dtype, m)
        cells = 0
        for tokens in visits:
            made = []
            for batch, rows in enumerate(batches):
                slot, cells = cells % 2, cells + 1
                hidden = torch.randn(rows, tokens, spec.hidden_size, generator=generator).to(dtype)
                made.append(hidden.clone())
                cell = cell_of(batch, slot, tokens)
                activations.keep(cell, hidden)
                run(activations.store(cell))
            for batch in range(len(batches)):
                slot, cells = cells % 2, cells + 1
                cell = cell_of(batch, slot, tokens)
                run(activations.load(cell))
                assert activations.take(cell).equal(made[batch])
        activations.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tier(
    dtype: torch.dtype, split: dict[str, int], device: str, machine: Any, run: Any, spec: Any
) -> None:
    assert_round_trips(device, split, [3, 3, 2], 7, [7, 7, 1, 1], dtype, machine, run, spec)


@settings(max_examples=40)
@given(
    device=st.sampled_from(["cpu", "emulated"]),
    split=st.sampled_from(SPLITS),
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    prompt=st.integers(1, 40),
    later=st.lists(st.integers(1, 40), max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    device: str,
    split: dict[str, int],
    batches: list[int],
    prompt: int,
    later: list[int],
    dtype: torch.dtype,
    machine: Any,
    run: Any,
    spec: Any,
) -> None:
    visits = [prompt, *(min(tokens, prompt) for tokens in later)]
    assert_round_trips(device, split, batches, prompt, visits, dtype, machine, run, spec)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("tier", list(Tier), ids=str)
def test_only_what_is_away_moves(device: str, tier: Tier, machine: Any, spec: Any) -> None:
    with machine(device) as m:
        policy = Policy(activations={str(tier): 100})
        layout = hidden_layout(spec, policy, 2, torch.float32, m.device.topology)
        activations = Activations([layout], 5, torch.float32, m)
        stays = tier is Tier.GPU or (tier is Tier.CPU and device == "cpu")
        activations.keep(cell_of(0, 0, 5), torch.ones(2, 5, spec.hidden_size))
        assert bool(activations.store(cell_of(0, 0, 5))) != stays
        assert bool(activations.load(cell_of(0, 1, 5))) != stays
        activations.close()
