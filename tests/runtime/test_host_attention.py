"""The host's rows: several cells under way at once answer as they do one by one."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen.kernels.scoring import Scoring
from flexgen.layout.cache import Span, cache_segments
from flexgen.layout.passes import Passes
from flexgen.layout.topology import LINKED
from flexgen.models.spec import AttentionSpec
from flexgen.policy import Policy
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.kvcache import KVCache

LAYER, PROMPT, BATCHES = 1, 3, [3, 4, 2]


def random(attention: AttentionSpec, rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = attention.heads, attention.kv_heads, attention.kv_heads
    q, k, v = (torch.randn(rows, h, tokens, attention.head_dim, generator=generator) for h in heads)
    return q, k, v


@pytest.mark.parametrize("cache", [{"cpu": 100}, {"cpu": 50, "disk": 50}, {"gpu": 34, "cpu": 33, "disk": 33}])
def test_cells_under_way_at_once(cache: dict[str, float], machine: Any, run: Any, spec: Any) -> None:
    own = spec.layers[0].attention
    policy, scoring = Policy(cache=cache), Scoring(own.head_dim**-0.5)
    starts = [torch.arange(rows) % 2 for rows in BATCHES]
    padding = [Padding(tuple(s.tolist()), s, s) for s in starts]
    with machine("emulated") as one, machine("emulated") as other, ExitStack() as stack:
        segments = [
            cache_segments(own.cache, policy, rows, PROMPT + 4, torch.float32, LINKED) for rows in BATCHES
        ]
        whole, split = (
            stack.enter_context(
                closing(KVCache({LAYER: segments}, {LAYER: own.heads}, Passes(PROMPT), m, slots=3))
            )
            for m in (one, other)
        )
        prompt = [BoundCell(0, LAYER, k, k, Span(0, PROMPT), padding[k]) for k in range(len(BATCHES))]
        for cell, rows in zip(prompt, BATCHES, strict=True):
            for kv in (whole, split):
                kv.attend(cell, *random(own, rows, PROMPT, cell.batch), scoring)
                run(kv.store(cell))
        for step in range(4):
            cells = [replace(cell, token=step + 1, span=Span(PROMPT + step, 1)) for cell in prompt]
            new = [random(own, rows, 1, 10 * step + batch + 5) for batch, rows in enumerate(BATCHES)]
            expected, on_device = [], []
            for cell in cells:
                run(whole.load(cell))
                expected.append(whole.attend(cell, *new[cell.batch], scoring))
                run(whole.store(cell))
            for cell in cells:
                run(split.load(cell))
                split.host.collect(cell, *new[cell.batch])
                split.host.send(cell)
            for cell in reversed(cells):
                split.attend_on_host(cell, scoring)
            for cell in cells:
                split.host.fetch(cell)
                on_device.append(split.attend_on_device(cell, *new[cell.batch], scoring))
            for cell in cells:
                joined = split.join(cell, on_device[cell.batch])
                torch.testing.assert_close(joined, expected[cell.batch], rtol=0, atol=0)
                run(split.store(cell))


def test_nothing_is_taken_where_the_host_attends_to_nothing(machine: Any, spec: Any) -> None:
    own = spec.layers[0].attention
    with machine("emulated") as m:
        for policy in (Policy(cache={"gpu": 100}), Policy(cache={"cpu": 100}, attend_on="gpu")):
            segments = {LAYER: [cache_segments(own.cache, policy, 2, 8, torch.float32, LINKED)]}
            with closing(KVCache(segments, {LAYER: own.heads}, Passes(4), m)) as cache:
                none = Padding((0, 0), torch.zeros(2), torch.zeros(2))
                cell = BoundCell(1, LAYER, 0, 0, Span(4, 1), none)
                assert not cache.host.attends(cell) and not cache.asks_host(cell)
                taken = m.host.used, m.device.memory.used
                cache.host.close()
                assert (m.host.used, m.device.memory.used) == taken
