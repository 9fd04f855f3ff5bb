"""The cache by itself: whatever tier holds it and whoever attends, attention is that over the whole history."""

from __future__ import annotations

from typing import Any

import pytest
import textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_sizes import in_pieces
from torch import Tensor

from flexgen.kernels.scoring import Scoring, Window
from flexgen.layout.cache import CacheLayout, Span, cache_segments
from flexgen.layout.passes import Passes
from flexgen.layout.topology import LINKED
from flexgen.memory.machine import Machine
from flexgen.models.layer import chunks
from flexgen.models.spec import CacheShape
from flexgen.policy import Policy, Split, Tier
from flexgen.quant import CODECS
from flexgen.results.trace import LaneName
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.compaction import Moved
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.pages import put

HEAD_DIM = 8
LAYERS = [1, 3]  # those of the model that have a cache


class History:
    """All keys and values of some batches, and the cache that must give the same attention."""

    def __init__(
        self,
        machine: Machine,
        run: Any,
        policy: Policy,
        batches: list[int],
        prompt: int,
        steps: int,
        ratio: int,
        starts: list[int],
        dtype: torch.dtype = torch.float32,
        page: int = 4,
        extends: bool = False,
        window: Window | None = None,
    ) -> None:
        """window: that of the first layer; the other one has none."""
        self.run, self.prompt, self.dtype = run, prompt, dtype
        self.kv_heads, self.heads = 2, 2 * ratio
        self.windows = dict.fromkeys(LAYERS, None) | {LAYERS[0]: window}
        topology = in_pieces(machine.device.topology, page_tokens=page, memory_page_tokens=page)
        storage = prompt + steps, dtype, topology
        shapes = {layer: CacheShape(self.kv_heads, HEAD_DIM, own) for layer, own in self.windows.items()}
        layers = {
            layer: [cache_segments(shape, policy, rows, *storage) for rows in batches]
            for layer, shape in shapes.items()
        }
        self.segments = layers[LAYERS[0]]
        heads = dict.fromkeys(LAYERS, self.heads)
        passes = Passes(prompt + extends, prompt if extends else 0)
        self.cache = KVCache(layers, heads, passes, machine)
        self.batches = batches
        self.padding = []
        for rows in batches:
            mine = [min(starts[n % len(starts)], prompt - 1) for n in range(rows)]
            there = torch.tensor(mine)
            self.padding.append(Padding(tuple(mine), there, there))
        self.generator = torch.Generator().manual_seed(0)
        empty = [torch.empty(rows, self.kv_heads, 0, HEAD_DIM, dtype=dtype) for rows in batches]
        self.keys = {(layer, k): empty[k] for layer in LAYERS for k in range(len(batches))}
        self.values = dict(self.keys)
        self.cells = 0

    def random(self, rows: int, heads: int, tokens: int) -> Tensor:
        return torch.randn(rows, heads, tokens, HEAD_DIM, generator=self.generator).to(self.dtype)

    def kept(self, batch: int, x: Tensor) -> Tensor:
        """Keys or values as the codecs of the batch's segments round them."""
        rounded = [
            torch.cat(
                list(s.heads.decode(s.heads.encode(x[s.rows.start : s.rows.stop]), x.shape[2], x.dtype)), 2
            )
            for s in self.segments[batch]
        ]
        return torch.cat(rounded)

    def cell(self, span: Span) -> BoundCell:
        """A cell of the first batch in the first slot."""
        return BoundCell(0, LAYERS[0], 0, 0, span, self.padding[0])

    def step(self, span: Span, atol: float, batches: list[int] | None = None) -> None:
        """One token (or the prompt) of every layer and of these batches, or of all."""
        for layer in LAYERS:
            scoring = Scoring(HEAD_DIM**-0.5, window=self.windows[layer])
            for batch in range(len(self.batches)) if batches is None else batches:
                rows, slot = self.batches[batch], self.cells % 2
                self.cells += 1
                q = self.random(rows, self.heads, span.new)
                k, v = (self.random(rows, self.kv_heads, span.new) for _ in range(2))
                seen = []
                for history, new in ((self.keys, k), (self.values, v)):
                    kept = self.kept(batch, new)
                    # The prompt attends to itself as it is; later tokens to what the cache keeps.
                    seen.append(torch.cat([history[layer, batch], kept if span.length else new], dim=2))
                    history[layer, batch] = torch.cat([history[layer, batch], kept], dim=2)
                padding = self.padding[batch]
                cell = BoundCell(0, layer, batch, slot, span, padding)
                self.run(self.cache.load(cell))
                ours = self.attend(cell, q, k, v, scoring)
                self.run(self.cache.store(cell))
                theirs = textbook.attention(q, *seen, padding.starts, scoring)
                # What a row gets where it is padding is not used: it need only be a number.
                real = (
                    torch.arange(span.length, span.length + span.new) >= torch.tensor(padding.starts)[:, None]
                )
                real = real[:, None, :, None].expand_as(theirs)
                assert ours.isfinite().all()
                torch.testing.assert_close(ours.double()[real], theirs[real], rtol=0, atol=atol)

    def attend(self, cell: BoundCell, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """At once, or of several tokens in every second cell, by rows and tokens."""
        new = cell.span.new
        if new == 1 or self.cells % 2:
            return self.cache.attend(cell, q, k, v, scoring)
        self.cache.keep(cell, k, v)
        out = torch.empty_like(q)
        for part in chunks(len(q), new, max(new - 1, 1)):
            asked = q[part.rows, :, part.tokens]
            out[part.rows, :, part.tokens] = self.cache.attend_chunk(cell, part, asked, k, v, scoring)
        return out

    def check_cells(self, news: list[int], atol: float = 1e-5) -> None:
        """Cells of these numbers of new tokens, one after another."""
        length = 0
        for new in news:
            self.step(Span(length, new), atol)
            length += new

    def check(self, steps: int, atol: float = 1e-5) -> None:
        self.step(Span(0, self.prompt), atol)
        for token in range(steps):
            self.step(Span(self.prompt + token, 1), atol)


KINDS = [
    (device, tier, attend_on)
    for device in ("cpu", "emulated")
    for tier in Tier
    for attend_on in ("cpu", "gpu")
]  # fmt: skip


@pytest.mark.parametrize(("device", "tier", "attend_on"), KINDS, ids=lambda value: str(value))
@pytest.mark.parametrize("prompt", [3, 4, 5, 8])  # before, at and after the end of a page, and of two
@pytest.mark.parametrize("codec", ["none", *CODECS])
@pytest.mark.parametrize("window", [None, Window(3), Window(4, chunked=True)])
def test_every_kind_of_segment_across_pages(
    window: Window | None,
    codec: str,
    prompt: int,
    device: str,
    tier: Tier,
    attend_on: str,
    machine: Any,
    run: Any,
) -> None:
    policy = Policy(cache={str(tier): {"percent": 100, "codec": codec}}, attend_on=attend_on)
    with machine(device) as m:
        history = History(m, run, policy, [2, 1], prompt, 12 - prompt, 2, [0, 2], window=window)
        (segment,) = history.segments[0]
        pages = (12, 1) if (device, tier) == ("emulated", Tier.GPU) else (4, 3)
        pages = pages if window is None else (4, 2)
        assert (segment.tier, (segment.page_tokens, segment.pages)) == (tier, pages)
        history.check(12 - prompt)
        history.cache.close()


WINDOWS = st.one_of(st.none(), st.builds(Window, st.integers(1, 12), st.booleans(), st.just(0)))
SPLITS = st.sampled_from(
    [
        {"gpu": 34, "cpu": 33, "disk": 33},
        {"gpu": 50, "disk": 50},
        {"cpu": 50, "disk": 50},
        {"gpu": 50, "cpu": 50},
    ]
)


@settings(max_examples=60)
@given(
    device=st.sampled_from(["cpu", "emulated"]),
    cache=SPLITS,
    codecs=st.fixed_dictionaries({str(tier): st.sampled_from(["none", *CODECS]) for tier in Tier}),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    prompt=st.integers(1, 10),
    steps=st.integers(0, 9),
    page=st.integers(1, 7),
    ratio=st.sampled_from([1, 2, 8]),
    starts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    window=WINDOWS,
)
def test_rows_on_several_tiers(
    device: str,
    cache: dict[str, int],
    codecs: dict[str, str],
    attend_on: str,
    batches: list[int],
    prompt: int,
    steps: int,
    page: int,
    ratio: int,
    starts: list[int],
    window: Window | None,
    machine: Any,
    run: Any,
) -> None:
    shares = {tier: {"percent": percent, "codec": codecs[tier]} for tier, percent in cache.items()}
    policy = Policy(cache=shares, attend_on=attend_on)
    with machine(device) as m:
        history = History(m, run, policy, batches, prompt, steps, ratio, starts, page=page, window=window)
        history.check(steps)
        history.cache.close()


@settings(max_examples=50)
@given(
    device=st.sampled_from(["cpu", "emulated"]),
    cache=SPLITS | st.sampled_from([{str(tier): 100} for tier in Tier]),
    codecs=st.fixed_dictionaries({str(tier): st.sampled_from(["none", *CODECS]) for tier in Tier}),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    news=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    page=st.integers(1, 7),
    ratio=st.sampled_from([1, 2, 8]),
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    window=WINDOWS,
)
def test_any_number_of_new_tokens_after_any_number_of_cached_ones(
    device: str,
    cache: dict[str, int],
    codecs: dict[str, str],
    attend_on: str,
    batches: list[int],
    news: list[int],
    page: int,
    ratio: int,
    starts: list[int],
    window: Window | None,
    machine: Any,
    run: Any,
) -> None:
    """Padding may be longer than the first cells; rows that are all padding so far get anything that is a number."""
    shares = {tier: {"percent": percent, "codec": codecs[tier]} for tier, percent in cache.items()}
    with machine(device) as m:
        history = History(
            m, run, Policy(cache=shares, attend_on=attend_on), batches, sum(news), 0, ratio, starts,
            page=page, extends=True, window=window,
        )  # fmt: skip
        history.check_cells(news)
        history.cache.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("tier", list(Tier), ids=str)
def test_attention_of_several_tokens_runs_on_the_device(
    tier: Tier, attend_on: str, device: str, machine: Any, run: Any
) -> None:
    """Rows that the host attends in a decode step come to the device for several tokens, and go home again."""
    policy = Policy(cache={str(tier): 100}, attend_on=attend_on)
    with machine(device) as m:
        history = History(m, run, policy, [2], 12, 0, 1, [0], extends=True)
        history.check_cells([5])
        cache, cell = history.cache, history.cell(Span(5, 4))
        assert not cache.asks_host(cell)
        lanes = [stage.lane for chain in cache.load(cell) for stage in chain]
        assert lanes == [
            *(["disk_read"] if tier is Tier.DISK else []),
            *(["to_device"] if tier is not Tier.GPU and device == "emulated" else []),
        ]
        lanes = [stage.lane for chain in cache.store(cell) for stage in chain]
        assert ("from_device" in lanes) == (tier is not Tier.GPU and device == "emulated")
        assert ("disk_write" in lanes) == (tier is Tier.DISK)
        cache.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_bfloat16(device: str, machine: Any, run: Any) -> None:
    policy = Policy(cache={"gpu": 34, "cpu": 33, "disk": 33})
    with machine(device) as m:
        history = History(m, run, policy, [3], 5, 8, 2, [0, 1], torch.bfloat16)
        history.check(8, atol=0.05)
        history.cache.close()


def test_a_second_block_finds_nothing_of_the_first(machine: Any, run: Any) -> None:
    policy = Policy(cache={"gpu": 34, "cpu": 33, "disk": 33})
    with machine("emulated") as m:
        history = History(m, run, policy, [3], 6, 8, 1, [0, 2])
        history.check(8)
        for kept in (history.keys, history.values):
            for key in kept:
                kept[key] = kept[key][:, :, :0]
        history.prompt = 3  # shorter than what the buffers were made for
        history.check(6)
        history.cache.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("dropped", [0, 2], ids=["same columns", "fewer columns"])
@pytest.mark.parametrize("window", [None, Window(3), Window(5)])
@pytest.mark.parametrize("cache", [{str(tier): 100} for tier in Tier] + [{"gpu": 34, "cpu": 33, "disk": 33}])
def test_rows_move_together_and_go_on(
    cache: dict[str, int], window: Window | None, dropped: int, device: str, machine: Any, run: Any
) -> None:
    """Rows of three batches become two batches; `dropped` columns are padding of all rows that continue."""
    policy = Policy(cache=cache)
    with machine(device) as m:
        history = History(m, run, policy, [3, 3, 3], 7, 9, 2, [dropped], window=window)
        history.check(4)
        length, new = 11, 11 - dropped
        groups = [[(0, 1), (1, 0), (1, 2)], [(2, 0)]]
        moved = [Moved(tuple(rows), (length,) * 3, new, None) for rows in groups]
        used = m.host.used, m.device.memory.used, m.disk.used
        history.cache.regroup(moved, policy.cache)
        assert (m.host.used, m.device.memory.used, m.disk.used) == used, "moving takes no second cache"
        for kept in (history.keys, history.values):
            before = dict(kept)
            kept.clear()
            for layer in LAYERS:
                for batch, rows in enumerate(groups):
                    picked = [before[layer, source][row, :, dropped:] for source, row in rows]
                    kept[layer, batch] = torch.stack(picked)
        history.batches = [3, 1]
        history.padding = [Padding((0,) * n, torch.zeros(n), torch.zeros(n)) for n in history.batches]
        for (layer, _), parts in history.cache._storage._parts.items():
            for part in (
                parts if history.windows[layer] is None else ()
            ):  # as in a new cache: kernels in torch multiply what is not filled
                pages = part.pages or part.tail_page
                filled = new % 4 if part.tail_page else new
                beyond = torch.cat([page[0] for page in pages], dim=2)[:, :, filled:]
                assert beyond.numel() and not beyond.any()
        for token in range(length - dropped, 16 - dropped):
            history.step(Span(token, 1), 1e-5)
        history.cache.reset()
        history.__dict__.update(batches=[3, 3, 3], padding=history.padding[:1] * 3)
        for kept in (history.keys, history.values):
            kept.update({(j, n): torch.empty(3, 2, 0, HEAD_DIM) for j in LAYERS for n in range(3)})
        history.check(9)
        history.cache.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("window", [None, Window(3)])
@pytest.mark.parametrize("cache", [{str(tier): 100} for tier in Tier] + [{"gpu": 34, "cpu": 33, "disk": 33}])
def test_a_batch_stays_while_others_move_and_prompts_enter(
    cache: dict[str, int], window: Window | None, device: str, machine: Any, run: Any
) -> None:
    policy = Policy(cache=cache)
    with machine(device) as m:
        history = History(m, run, policy, [3, 3, 3], 5, 9, 2, [0], window=window)
        history.check(3)
        whole = tuple((1, n) for n in range(3))

        def regroup(moved: list[Moved]) -> None:
            used = m.host.used, m.device.memory.used, m.disk.used
            history.cache.regroup(moved, policy.cache)
            assert (m.host.used, m.device.memory.used, m.disk.used) == used
            for kept in (history.keys, history.values):
                before = dict(kept)
                kept.clear()
                for layer in LAYERS:
                    for batch, each in enumerate(moved):
                        rows = [before[layer, source][row] for source, row in each.rows]
                        kept[layer, batch] = (
                            torch.stack(rows) if rows else torch.empty(each.new, 2, 0, HEAD_DIM)
                        )
            history.batches = [each.count for each in moved]
            history.padding = [Padding((0,) * n, torch.zeros(n), torch.zeros(n)) for n in history.batches]

        regroup(
            [
                Moved(whole, (8, 8, 8), 8, 1),
                Moved(((2, 0), (0, 1), (2, 2)), (8, 8, 8), 8, None),  # as sorted by their numbers of tokens
                Moved((), (8, 8, 8), 0, None, 3),
            ]
        )
        history.step(Span(0, 4), 1e-5, [2])
        for token in range(3):
            history.step(Span(8 + token, 1), 1e-5, [0, 1])
            history.step(Span(4 + token, 1), 1e-5, [2])
        lengths = (11, 11, 7)
        entered = tuple((2, n) for n in range(3))
        regroup(
            [
                Moved(entered, lengths, 7, 2),
                Moved(((0, 0), (1, 2)), lengths, 11, None),
                Moved((), lengths, 0, None, 2),  # fewer than the batch that was there
            ]
        )
        history.step(Span(0, 5), 1e-5, [2])
        for token in range(3):
            history.step(Span(7 + token, 1), 1e-5, [0])
            history.step(Span(11 + token, 1), 1e-5, [1])
            history.step(Span(5 + token, 1), 1e-5, [2])
        history.cache.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("tier", list(Tier), ids=str)
def test_what_moves(device: str, tier: Tier, machine: Any, run: Any) -> None:
    """A resident part is never loaded; one on disk is written only when a page is full."""
    policy = Policy(cache={str(tier): 100}, attend_on="gpu")
    with machine(device) as m:
        history = History(m, run, policy, [2], 5, 7, 1, [0])
        cache, (segment,) = history.cache, history.segments[0]
        history.step(Span(0, 5), 1e-5)
        for length in range(5, 12):
            lanes = [stage.lane for chain in cache.load(history.cell(Span(length, 1))) for stage in chain]
            assert bool(lanes) != segment.resident
            assert ("disk_read" in lanes) == (tier is Tier.DISK)
            assert ("to_device" in lanes) == (tier is not Tier.GPU and device == "emulated")
            stored = [stage.lane for chain in cache.store(history.cell(Span(length, 1))) for stage in chain]
            assert ("disk_write" in stored) == (tier is Tier.DISK and (length + 1) % 4 == 0)
            history.step(Span(length, 1), 1e-5)
        assert not cache.load(history.cell(Span(0, 5))), "before the prompt there is nothing to load"
        cache.close()


@given(page=st.integers(1, 5), pages=st.integers(1, 5), begin=st.integers(0, 10), tokens=st.integers(0, 12))
def test_put_crosses_pages(page: int, pages: int, begin: int, tokens: int) -> None:
    capacity = page * pages
    begin = min(begin, capacity)
    tokens = min(tokens, capacity - begin)
    held = [(torch.zeros(2, 3, page, 4), torch.zeros(2, 3, page, 4)) for _ in range(pages)]
    k, v = torch.randn(2, 2, 3, tokens, 4)
    put(held, begin, k, v)
    for n, new in enumerate((k, v)):
        flat = torch.cat([both[n] for both in held], dim=2)
        assert flat[:, :, begin : begin + tokens].equal(new)
        assert not flat[:, :, :begin].any() and not flat[:, :, begin + tokens :].any()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("tier", list(Tier), ids=str)
def test_a_window_moves_and_stores_only_its_pages(device: str, tier: Tier, machine: Any, run: Any) -> None:
    """Pages of 4 tokens: 6 tokens are in at most 3 of them, of which one is being filled."""
    policy = Policy(cache={str(tier): 100}, attend_on="gpu")
    with machine(device) as m:
        history = History(m, run, policy, [2], 30, 20, 1, [0], window=Window(6))
        (segment,) = history.segments[0]
        assert (segment.pages, segment.page_tokens) == (3, 4)
        layout = CacheLayout((segment,), 0, m.device.topology)
        for length in range(1, 50):
            for route in layout.load(Span(length, 1)):
                moved = {move.lane: move.nbytes // segment.page_bytes for move in route.moves}
                full, filling = min(length // 4, 2), bool(length % 4)
                assert moved.get(LaneName.DISK_READ, full) == full
                assert moved.get(LaneName.TO_DEVICE, full + filling) == full + filling
        for route in layout.store(Span(0, 30)):
            for move in route.moves:
                assert move.nbytes <= segment.nbytes
        history.check(20)
        history.cache.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("tier", list(Tier), ids=str)
def test_a_cut_ring_goes_on_if_it_has_the_tokens(device: str, tier: Tier, machine: Any, run: Any) -> None:
    policy = Policy(cache={str(tier): 100}, attend_on="gpu")
    with machine(device) as m:
        history = History(m, run, policy, [1], 30, 0, 1, [0], extends=True, window=Window(6))
        history.check_cells([13, 1, 1])
        assert not history.cache.can_cut(15, 11)
        assert history.cache.can_cut(15, 13)
        history.cache.cut(15, 13)
        for kept in (history.keys, history.values):
            kept.update({key: x[:, :, :13] for key, x in kept.items()})
        for span in (Span(13, 4), Span(17, 1), Span(18, 9), Span(27, 1)):
            history.step(span, 1e-5)
        history.cache.close()


@given(page=st.integers(1, 4), pages=st.integers(1, 4), begin=st.integers(0, 30), tokens=st.integers(0, 30))
def test_put_to_a_ring_keeps_the_last_pages(page: int, pages: int, begin: int, tokens: int) -> None:
    held = [(torch.zeros(1, 1, page, 1), torch.zeros(1, 1, page, 1)) for _ in range(pages)]
    numbers = torch.arange(begin, begin + tokens, dtype=torch.float32).view(1, 1, -1, 1)
    put(held, begin, numbers + 1, numbers + 1)
    last = (begin + tokens - 1) // page
    for position in range(max(begin, (last - pages + 1) * page), begin + tokens):
        assert held[position // page % pages][0][0, 0, position % page] == position + 1


def test_rows_of_the_split_are_contiguous_segments() -> None:
    split = Split(gpu=34, cpu=33, disk=33)
    segments = cache_segments(CacheShape(2, HEAD_DIM), Policy(cache=split), 7, 20, torch.float32, LINKED)
    assert [n for segment in segments for n in segment.rows] == list(range(7))
    assert {segment.tier: segment.rows for segment in segments} == split.rows(7)
