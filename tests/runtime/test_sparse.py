"""Sparse attention in the cache: the same choice whatever holds it, and what is read of it from disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes
from torch import Tensor

from flexgen.kernels.scoring import Scoring
from flexgen.kernels.sparse_attention import Choice, Sparsity
from flexgen.layout.cache import CacheSegment, Span, cache_segments
from flexgen.layout.passes import Passes
from flexgen.memory.disk import DiskIO, Read
from flexgen.memory.machine import Machine
from flexgen.models.spec import CacheShape
from flexgen.policy import Policy, Tier
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.sparse import key_reads, value_reads
from flexgen.units import BLOCK

HEAD_DIM = 64  # float32: 16 tokens of a head are a block of the disk
TOKEN = HEAD_DIM * 4
KV_HEADS = 2
SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True, scope="module")
def _short_pages() -> Iterator[None]:
    """Pages on disk of 32 tokens, two choices in each; pages in memory of 24."""
    with piece_sizes(page_tokens=32, memory_page_tokens=24, choice_bytes=BLOCK):
        yield


def reference(
    q: Tensor, k: Tensor, v: Tensor, start: int, share: float, unit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one row's last token in float64, q (heads, d), k and v (kv_heads, tokens, d).

    Also which K/V heads are sure: the last that is chosen and the first that is not are apart; and the blocks
    that each chooses.
    """
    kv_heads, total, _ = k.shape
    grouped = q.double().view(kv_heads, -1, HEAD_DIM)
    scores = grouped @ k.double().mT * SCALE
    scores[..., :start] = -math.inf
    p = scores.softmax(-1)
    cached = total - 1
    weights = p.sum(1)[:, :cached]
    weights = torch.nn.functional.pad(weights, (0, -cached % unit)).view(kv_heads, -1, unit).sum(-1)
    blocks = weights.shape[1] - start // unit if cached > start else 0
    keep = math.ceil(round(share * blocks, 9))
    ranked = weights.sort(-1, descending=True)
    sure = torch.ones(kv_heads, dtype=torch.bool)
    if keep < blocks:
        sure = ranked.values[:, keep - 1] > 1.001 * ranked.values[:, keep]
    chosen = torch.zeros_like(weights).scatter_(1, ranked.indices[:, :keep], 1.0)
    mask = torch.cat([chosen.repeat_interleave(unit, 1)[:, :cached], torch.ones(kv_heads, 1)], 1)
    return ((p * mask[:, None]) @ v.double()).flatten(0, 1), sure, chosen.bool()


class History:
    """All keys and values of one batch in one layer, and the cache that holds them."""

    def __init__(self, machine: Machine, run: Any, policy: Policy, starts: list[int], capacity: int) -> None:
        self.run, self.share, self.starts = run, policy.attn_sparsity, starts
        self.heads = 2 * KV_HEADS
        topology = machine.device.topology
        self.segments = cache_segments(
            CacheShape(KV_HEADS, HEAD_DIM), policy, len(starts), capacity, torch.float32, topology
        )
        self.cache = KVCache({0: [self.segments]}, {0: self.heads}, Passes(capacity), machine)
        there = torch.tensor(starts)
        self.padding = Padding(tuple(starts), there, there)
        self.generator = torch.Generator().manual_seed(len(starts) + capacity)
        self.keys = self.values = torch.empty(len(starts), KV_HEADS, 0, HEAD_DIM)
        self.sure = 0
        self.chosen: dict[int, Tensor] = {}  # by row, of the last step

    def random(self, heads: int, tokens: int) -> Tensor:
        return torch.randn(len(self.starts), heads, tokens, HEAD_DIM, generator=self.generator)

    def cell(self, slot: int, span: Span) -> BoundCell:
        return BoundCell(0, 0, 0, slot, span, self.padding)

    def step(self, span: Span) -> None:
        """The prompt or one token, compared with the reference."""
        slot = span.length % 2
        q = 1.5 * self.random(self.heads, span.new)
        k, v = (self.random(KV_HEADS, span.new) for _ in range(2))
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        cell = self.cell(slot, span)
        self.run(self.cache.load(cell))
        out = self.cache.attend(cell, q, k, v, Scoring(SCALE))
        self.run(self.cache.store(cell))
        if not span.length:
            return  # attention over the prompt is dense: test_kvcache
        for segment in self.segments:
            for row in segment.rows:
                unit = segment.sparsity.unit
                expected, sure, self.chosen[row] = reference(
                    q[row, :, 0], self.keys[row], self.values[row], self.starts[row], self.share, unit
                )
                sure_heads = sure.repeat_interleave(2)
                self.sure += int(sure.sum())
                torch.testing.assert_close(
                    out[row, sure_heads, 0].double(), expected[sure_heads], rtol=0, atol=2e-5
                )


KINDS = [
    (device, tier, attend_on)
    for device in ("cpu", "emulated")
    for tier in Tier
    for attend_on in ("cpu", "gpu")
]  # fmt: skip


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize(("device", "tier", "attend_on"), KINDS, ids=lambda value: str(value))
def test_every_kind_of_segment(
    device: str, tier: Tier, attend_on: str, share: float, machine: Any, run: Any
) -> None:
    policy = Policy(cache={str(tier): 100}, attend_on=attend_on, attn_sparsity=share)
    with machine(device) as m:
        history = History(m, run, policy, [0, 21, 40], 150)
        (segment,) = history.segments
        in_memory = 150 if (device, tier) == ("emulated", Tier.GPU) else 22
        assert (segment.page_tokens, segment.sparsity.unit) == (
            (32, 16) if tier is Tier.DISK else (in_memory, 1)
        )
        history.step(Span(0, 90))
        for length in range(90, 149):
            history.step(Span(length, 1))
        assert history.sure > 0.95 * 59 * 3 * KV_HEADS
        history.cache.close()


@settings(max_examples=40)
@given(
    device=st.sampled_from(["cpu", "emulated"]),
    cache=st.sampled_from(
        [{"gpu": 34, "cpu": 33, "disk": 33}, {"gpu": 50, "disk": 50}, {"cpu": 50, "disk": 50}, {"disk": 100}]
    ),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    starts=st.lists(st.integers(0, 120), min_size=1, max_size=5),
    prompt=st.integers(1, 120),
    steps=st.integers(1, 9),
    share=st.sampled_from([0.01, 0.1, 0.3, 0.7]),
)
def test_rows_on_several_tiers(
    device: str,
    cache: dict[str, int],
    attend_on: str,
    starts: list[int],
    prompt: int,
    steps: int,
    share: float,
    machine: Any,
    run: Any,
) -> None:
    policy = Policy(cache=cache, attend_on=attend_on, attn_sparsity=share)
    starts = [min(start, prompt - 1) for start in starts]
    with machine(device) as m:
        history = History(m, run, policy, starts, prompt + steps)
        history.step(Span(0, prompt))
        for token in range(steps):
            history.step(Span(prompt + token, 1))
        history.cache.close()


# What is read


@contextmanager
def counted(monkeypatch: Any) -> Iterator[list[Read]]:
    """The reads that were made meanwhile."""
    made: list[Read] = []
    read = DiskIO.read

    def counting(self: DiskIO, reads: Any) -> None:
        made.extend(reads)
        read(self, reads)

    with monkeypatch.context() as patch:
        patch.setattr(DiskIO, "read", counting)
        yield made


def read_in_a_step(history: History, span: Span, monkeypatch: Any) -> int:
    with counted(monkeypatch) as made:
        history.step(span)
    return sum(read.target.numel() for read in made)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_bytes_read_are_the_keys_and_a_share_of_the_values(
    device: str, share: float, machine: Any, run: Any, monkeypatch: Any
) -> None:
    rows, length = 3, 7 * 32 + 5
    policy = Policy(cache={"disk": 100}, attn_sparsity=share)
    with machine(device) as m:
        history = History(m, run, policy, [0] * rows, 8 * 32)
        history.step(Span(0, length))
        heads, whole = (
            rows * KV_HEADS,
            7 * 32 * TOKEN,
        )  # bytes of keys, or of values, that are on disk by head
        with counted(monkeypatch) as made:
            run(history.cache.load(history.cell(1, Span(length, 1))))
        assert sum(read.target.numel() for read in made) == heads * whole, "keys come ahead, and nothing else"
        nbytes = read_in_a_step(history, Span(length, 1), monkeypatch)
        values = nbytes - heads * whole
        on_disk = sum(int(history.chosen[row][:, :14].sum()) for row in range(rows))
        assert values == on_disk * BLOCK, "each chosen block once"
        assert 0 < values <= heads * (share * whole + BLOCK)
        assert nbytes <= (1 + share) / 2 * 2 * heads * whole + heads * BLOCK
        history.cache.close()


def test_exact_attention_reads_whole_pages_ahead(machine: Any, run: Any, monkeypatch: Any) -> None:
    with machine("cpu") as m:
        history = History(m, run, Policy(cache={"disk": 100}), [0, 0], 4 * 32)
        history.step(Span(0, 70))
        with counted(monkeypatch) as made:
            run(history.cache.load(history.cell(1, Span(70, 1))))
        assert [(read.offset, read.target.numel()) for read in made] == [(0, 2 * 64 * TOKEN * 2 * KV_HEADS)]
        with counted(monkeypatch) as made:
            q, k = history.random(4, 1), history.random(2, 1)
            history.cache.attend(history.cell(1, Span(70, 1)), q, k, k, Scoring(SCALE))
        assert not made
        history.cache.close()


def test_where_the_device_attends_pages_come_whole(machine: Any, run: Any, monkeypatch: Any) -> None:
    policy = Policy(cache={"disk": 100}, attend_on="gpu", attn_sparsity=0.1)
    with machine("emulated") as m:
        history = History(m, run, policy, [0], 4 * 32)
        history.step(Span(0, 64))
        nbytes = read_in_a_step(history, Span(64, 1), monkeypatch)
        assert nbytes == 2 * KV_HEADS * 64 * TOKEN
        history.cache.close()


@given(data=st.data(), rows=st.integers(1, 3), pages=st.integers(0, 4), rest=st.integers(0, 31))
def test_chosen_blocks_are_read_once_and_neighbours_together(
    data: Any, rows: int, pages: int, rest: int
) -> None:
    segment = CacheSegment(
        Tier.DISK,
        range(rows),
        on_device=True,
        resident=False,
        pages=5,
        page_tokens=32,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        sparsity=Sparsity(0.3, 16),
    )
    length = 32 * pages + rest
    position = st.integers(0, length)
    chosen = data.draw(
        st.lists(
            st.lists(position, min_size=4, max_size=4), min_size=rows * KV_HEADS, max_size=rows * KV_HEADS
        )
    )
    choice = Choice(torch.tensor(chosen).view(rows, KV_HEADS, 4), torch.ones(rows, 4, 4))
    buffer = torch.arange(segment.nbytes // BLOCK).repeat_interleave(BLOCK).to(torch.uint8)
    reads = value_reads(choice, segment, "a file", 10 * BLOCK, buffer, Span(length, 1))  # type: ignore[arg-type]
    blocks = []
    for read in reads:
        first = int(read.target[0])
        count = read.target.numel() // BLOCK
        assert read.offset == (10 + first) * BLOCK and read.target.numel() == count * BLOCK
        assert read.target.equal(buffer[first * BLOCK : (first + count) * BLOCK])
        blocks += range(first, first + count)
        blocks.append(-1)
    per_page = 2 * rows * KV_HEADS * 2
    expected = {
        t // 32 * per_page + per_page // 2 + item * 2 + t % 32 // 16
        for item, mine in enumerate(chosen)
        for t in mine
        if t < 32 * pages
    }
    found = [block for block in blocks if block >= 0]
    assert found == sorted(expected)
    gaps = sum(1 for a, b in zip(found, found[1:], strict=False) if b != a + 1)
    assert len(reads) == gaps + bool(found)
    keys = key_reads(segment, "a file", 0, buffer, pages)  # type: ignore[arg-type]
    assert [int(read.target[0]) for read in keys] == [page * per_page for page in range(pages)]
    assert all(read.target.numel() == per_page // 2 * BLOCK for read in keys)


def test_a_failed_read_reaches_the_caller(machine: Any, run: Any, monkeypatch: Any) -> None:
    policy = Policy(cache={"disk": 100}, attn_sparsity=0.3)
    with machine("cpu") as m:
        history = History(m, run, policy, [0, 0], 150)
        with closing(history.cache):
            history.step(Span(0, 130))
            run(history.cache.load(history.cell(0, Span(130, 1))))

            def broken(self: DiskIO, reads: Any) -> None:
                raise OSError("the disk is gone")

            monkeypatch.setattr(DiskIO, "read", broken)
            q, k = history.random(4, 1), history.random(2, 1)
            with pytest.raises(OSError, match="the disk is gone"):
                history.cache.attend(history.cell(0, Span(130, 1)), q, k, k, Scoring(SCALE))


def test_parts_larger_than_a_chunk_are_read_in_several(machine: Any, run: Any, monkeypatch: Any) -> None:
    """Never handed to the threads that read ahead: each call of them is within what is read at once."""
    policy = Policy(cache={"disk": 100}, attn_sparsity=0.9)
    with machine("cpu") as m:
        m.io.chunk = 2 * BLOCK
        history = History(m, run, policy, [0, 0], 300)
        history.step(Span(0, 290))
        calls: list[int] = []
        read: Callable[..., None] = DiskIO.read
        monkeypatch.setattr(
            DiskIO, "read", lambda self, reads: (calls.append(len(reads)), read(self, reads))[1]
        )
        history.step(Span(290, 1))
        assert len(calls) > 1 + m.io.threads
        history.cache.close()
