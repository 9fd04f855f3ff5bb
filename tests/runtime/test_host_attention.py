"""The host's rows: several cells under way at once answer as they do one by one."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen.layout.cache import Span, cache_segments
from flexgen.layout.topology import LINKED
from flexgen.models.spec import AttentionSpec
from flexgen.policy import Policy
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.pages import Padding

LAYER, PROMPT, BATCHES = 1, 3, [3, 4, 2]


def random(attention: AttentionSpec, rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = attention.heads, attention.kv_heads, attention.kv_heads
    q, k, v = (torch.randn(rows, h, tokens, attention.head_dim, generator=generator) for h in heads)
    return q, k, v


@pytest.mark.parametrize("cache", [{"cpu": 100}, {"cpu": 50, "disk": 50}, {"gpu": 34, "cpu": 33, "disk": 33}])
def test_cells_under_way_at_once(cache: dict[str, float], machine: Any, run: Any, spec: Any) -> None:
    own = spec.layers[0].attention
    policy, scale = Policy(cache=cache), own.head_dim**-0.5
    starts = [torch.arange(rows) % 2 for rows in BATCHES]
    padding = [Padding(tuple(s.tolist()), s, s) for s in starts]
    with machine("emulated") as one, machine("emulated") as other, ExitStack() as stack:
        segments = [
            cache_segments(own.cache, policy, rows, PROMPT + 4, torch.float32, LINKED) for rows in BATCHES
        ]
        whole, split = (
            stack.enter_context(closing(KVCache({LAYER: segments}, {LAYER: own.heads}, PROMPT, m, slots=3)))
            for m in (one, other)
        )
        for batch, rows in enumerate(BATCHES):
            for kv in (whole, split):
                kv.attend(
                    LAYER,
                    batch,
                    batch,
                    Span(0, PROMPT),
                    *random(own, rows, PROMPT, batch),
                    padding[batch],
                    scale,
                )
                run(kv.store(LAYER, batch, batch, Span(0, PROMPT)))
        for step in range(4):
            span, cells = Span(PROMPT + step, 1), list(enumerate(BATCHES))
            new = [random(own, rows, 1, 10 * step + batch + 5) for batch, rows in cells]
            expected, on_device = [], []
            for batch, _ in cells:
                place = LAYER, batch, batch
                run(whole.load(*place, span))
                expected.append(whole.attend(*place, span, *new[batch], padding[batch], scale))
                run(whole.store(*place, span))
            for batch, _ in cells:
                run(split.load(LAYER, batch, batch, span))
                split.host.collect(LAYER, batch, batch, *new[batch])
                split.host.send(LAYER, batch, batch)
            for batch, _ in reversed(cells):
                split.attend_on_host(LAYER, batch, batch, span, padding[batch], scale)
            for batch, _ in cells:
                split.host.fetch(LAYER, batch, batch)
                on_device.append(
                    split.attend_on_device(LAYER, batch, batch, span, *new[batch], padding[batch], scale)
                )
            for batch, _ in cells:
                torch.testing.assert_close(
                    split.join(LAYER, batch, batch, span, on_device[batch]), expected[batch], rtol=0, atol=0
                )
                run(split.store(LAYER, batch, batch, span))


def test_nothing_is_taken_where_the_host_attends_to_nothing(machine: Any, spec: Any) -> None:
    own = spec.layers[0].attention
    with machine("emulated") as m:
        for policy in (Policy(cache={"gpu": 100}), Policy(cache={"cpu": 100}, attend_on="gpu")):
            segments = {LAYER: [cache_segments(own.cache, policy, 2, 8, torch.float32, LINKED)]}
            with closing(KVCache(segments, {LAYER: own.heads}, 4, m)) as cache:
                assert not cache.host.attends(LAYER, 0) and not cache.asks_host(LAYER, 0, Span(4, 1))
                taken = m.host.used, m.device.memory.used
                cache.host.close()
                assert (m.host.used, m.device.memory.used) == taken
