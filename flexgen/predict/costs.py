"""What each step of a schedule moves and takes: the cost model.

Every step's work is laid out in the chains and on the lanes that the runtime gives it, with the bytes that cross
each lane; `Hardware` turns bytes and flops into seconds. Sizes are asked of those who own them: layers, placement,
the cache's segments. A test runs the engine and counts, so that the two cannot drift apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from flexgen.layout.cache import CacheSegment, Span, cache_layout
from flexgen.layout.hidden import HiddenLayout, IdLayout, hidden_layout
from flexgen.layout.moves import Move, Route
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.plan import batch_sizes
from flexgen.layout.rows import row_layout
from flexgen.layout.weights import WeightLayout, count_pieces, weight_layouts
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Policy, Tier
from flexgen.predict.arithmetic import Arithmetic, alike_layers
from flexgen.predict.job import Job
from flexgen.predict.timeline import Costs
from flexgen.results.trace import LaneName
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, all_steps


class Load(NamedTuple):
    """One stage of a step: what it asks of its lane. `nbytes` cross a link or reach a disk; for a computation
    they are the queries and answers of rows that the host attends. Values that sparse attention reads in its midst
    are in the seconds alone."""

    lane: LaneName
    nbytes: int
    seconds: float


Loads = tuple[tuple[Load, ...], ...]
"""The chains of a step."""

_Key = tuple[Op, int, int, int, bool, bool]


@dataclass(frozen=True)
class CostedBlock:
    """A block of `prompts` prompts that runs in `order`.

    `tokens`: the passes that those of the grid stand for, named as in `Passes`: those up to 0 are the prefill. None
    stands for all passes. Where some are left out, a token reads as much of a cache on disk as the line through its
    pages says, and those of the grid in `flushing` write one.
    """

    prompts: int
    order: Order
    tokens: Sequence[int] | None = None
    flushing: Collection[int] = ()


class StepCosts:
    """The work of every step of one block of a job.

    `alike`: for each layer the first whose steps take the same as its own, but for loads of weights, which are the
    same for every token.

    What is looked up depends on the ids. They are taken to be all different, up to the vocabulary, and to lie
    evenly in the table: few others read more.
    """

    def __init__(
        self,
        job: Job,
        policy: Policy,
        layers: Sequence[Layer],
        placement: Placement,
        block: CostedBlock,
    ) -> None:
        workload, hardware = job.workload, job.hardware
        self._layers = layers
        self._last = len(layers) - 1
        self._spec = layers[0].spec
        self._placement = placement
        self._policy = policy
        self._dtype = placement.dtype
        self._prompt = workload.prompt_len
        self._passes = Passes(workload.prompt_len, policy.prefill_chunk)
        self._capacity = workload.capacity
        self._hardware = hardware
        self._topology = hardware.topology
        self._shared = hardware.topology.shares_host_memory
        self._batches = batch_sizes(policy, block.prompts)
        self._weights = weight_layouts(layers, placement, self._topology)
        alike: dict[WeightLayout, int] = {}
        self._same_weights = [alike.setdefault(layout, n) for n, layout in enumerate(self._weights)]
        self.weight_pieces = count_pieces(self._weights, len(self._batches))
        self._tokens = block.tokens or range(self._passes.first, workload.gen_len)
        self._flushing = block.flushing
        self._splits_attention = block.order.splits_attention
        self._arithmetic = Arithmetic(placement, hardware)
        most = max(self._batches) * self._passes.new
        self._rows = row_layout(layers, placement, self._topology, most)
        self.feeds_ids = (
            self._topology.keeps_ids(self._rows is not None) and not block.order.serial
        )  # as of the grid
        self._every_token = len(self._tokens) == workload.gen_len - self._passes.first
        self.alike = alike_layers(layers, placement, bool(hardware.packed_products))
        self._cache = {
            (n, rows): cache_layout(
                layer.layer_spec.attention, policy, rows, self._capacity, self._dtype, self._topology
            )
            for n in set(self.alike)
            if isinstance(layer := layers[n], AttentionLayer)
            for rows in set(self._batches)
        }
        self._known: dict[_Key, Loads] = {}
        self._timed: dict[_Key, Costs] = {}
        self._work: dict[Op, Callable[[_Key], Loads]] = {
            Op.LOAD_WEIGHTS: self._load_weights,
            Op.LOAD_CACHE: self._load_cache,
            Op.LOAD_HIDDEN: self._load_hidden,
            Op.PROJECT: self._project,
            Op.ATTEND: self._attend,
            Op.LOAD_ATTENDED: self._load_attended,
            Op.COMPUTE: self._compute,
            Op.STORE_HIDDEN: self._store_hidden,
            Op.STORE_CACHE: self._store_cache,
        }

    def __call__(self, step: Step) -> Costs:
        """The step's chains as (lane, seconds)."""
        key = self._key(step)
        if key not in self._timed:
            self._timed[key] = [[(load.lane, load.seconds) for load in chain] for chain in self._loads(key)]
        return self._timed[key]

    def loads(self, step: Step) -> Loads:
        """The step's chains, with their bytes."""
        return self._loads(self._key(step))

    def busy(self, token: int) -> dict[LaneName, float]:
        """Seconds that each lane works on a token of the grid."""
        total: dict[LaneName, float] = {}
        for step, count in self._kinds:
            for chain in self(step._replace(token=token)):
                for lane, seconds in chain:
                    total[lane] = total.get(lane, 0.0) + count * seconds
        return total

    @cached_property
    def _kinds(self) -> list[tuple[Step, int]]:
        """The steps of a token but for those that are alike, and how many of each there are."""
        alike = Counter(self.alike)
        counts: Counter[_Key] = Counter()
        steps: dict[_Key, Step] = {}
        of_a_layer = Grid(
            1, 1, len(self._batches), self.weight_pieces, splits_attention=self._splits_attention
        )
        for step in all_steps(of_a_layer):
            weights = step.op is Op.LOAD_WEIGHTS
            for layer in range(len(self._layers)) if weights else alike:
                one = Step(step.op, 0, layer, step.batch)
                key = self._key(one)
                counts[key] += 1 if weights else alike[layer]
                steps.setdefault(key, one)
        return [(step, counts[key]) for key, step in steps.items()]

    def _key(self, step: Step) -> _Key:
        """What a step's work depends on: (op, layer, token or piece, rows, whether it is the visit's first, whether
        it writes pages of the cache that it would not)."""
        op, i, j, k = step
        if op is Op.LOAD_WEIGHTS:
            return op, self._same_weights[j], k, 0, False, False
        return op, self.alike[j], self._tokens[i], self._batches[k], k == 0, i in self._flushing

    def _loads(self, key: _Key) -> Loads:
        if key not in self._known:
            self._known[key] = self._work[key[0]](key)
        return self._known[key]

    # Weights

    def _load_weights(self, key: _Key) -> Loads:
        _, layer, piece, *_ = key
        return self._timed_routes(self._weights[layer].load(piece, self.weight_pieces))

    # Hidden states and ids

    def _load_hidden(self, key: _Key) -> Loads:
        _, layer, token, rows, *_ = key
        new = self._span(token).new
        if layer == self._last and token < 0:
            return ()
        if layer:
            return self._timed_routes(self._hidden(rows).load(new))
        if self._rows is not None:
            return self._timed_routes(self._rows.load(rows * new))
        if self.feeds_ids and token > 0:
            return ()
        return self._timed_routes(IdLayout(rows, self._topology).load(new))

    def _store_hidden(self, key: _Key) -> Loads:
        _, layer, token, rows, *_ = key
        if layer == self._last:
            return self._timed_routes(IdLayout(rows, self._topology).store()) if token >= 0 else ()
        return self._timed_routes(self._hidden(rows).store(self._span(token).new))

    def _hidden(self, rows: int) -> HiddenLayout:
        return hidden_layout(self._spec, self._policy, rows, self._dtype, self._topology)

    # The KV cache

    def _load_cache(self, key: _Key) -> Loads:
        _, layer, token, rows, *_ = key
        if not self._layers[layer].has_cache:
            return ()
        layout, span = self._cache[layer, rows], self._span(token)
        return self._timed_routes(
            layout.inward(s, span, *self._pages(s, token, span.length)) for s in layout.moving(span)
        )

    def _store_cache(self, key: _Key) -> Loads:
        _, layer, token, rows, _, flushes = key
        if not self._layers[layer].has_cache:
            return ()
        layout, span = self._cache[layer, rows], self._span(token)
        return self._timed_routes(
            layout.outward(segment, span, self._flushed(segment, span, flushes))
            for segment in layout.segments
        )

    def _pages(self, segment: CacheSegment, token: int, cached: int) -> tuple[int, int]:
        """Bytes of the whole pages that hold `cached` tokens, and of the page that is being filled."""
        if self._every_token or segment.tier is not Tier.DISK or token <= 0:
            return segment.filled(cached)
        # A line with the mean of the steps, and nearly as steep.
        later = range(self._prompt, self._capacity - 1)
        both = [divmod(tokens, segment.page_tokens) for tokens in later]
        mean = sum(whole for whole, _ in both) / len(both)
        grown = (both[-1][0] - both[0][0]) * ((cached - self._prompt) / (len(both) - 1) - 0.5)
        filled = sum(bool(rest) for _, rest in both) / len(both)
        return int((mean + grown) * segment.page_bytes), int(filled * segment.page_bytes)

    def _flushed(self, segment: CacheSegment, span: Span, flushes: bool) -> int:
        """Bytes of the pages that became whole."""
        if self._every_token or span.length < self._prompt:
            return segment.flushed(span)
        if segment.tier is not Tier.DISK or not flushes or not self.flushes:
            return 0
        # One token stands for all that write pages; a cache with larger pages writes fewer of them.
        return segment.page_bytes * self._flushes_of(segment) // self.flushes

    @property
    def flushes(self) -> int:
        """How many tokens of the decode write pages of a cache on disk."""
        on_disk = (s for layout in self._cache.values() for s in layout.segments if s.tier is Tier.DISK)
        return max(map(self._flushes_of, on_disk), default=0)

    def _flushes_of(self, segment: CacheSegment) -> int:
        return (self._capacity - 1) // segment.page_tokens - self._prompt // segment.page_tokens

    # Computation

    def _compute(self, key: _Key) -> Loads:
        _, index, token, rows, first, _ = key
        layer, arithmetic, span = self._layers[index], self._arithmetic, self._span(token)
        if index == self._last and token < 0:
            return ()
        new = 1 if index == self._last else span.new  # the head takes the last position only
        seconds = arithmetic.products(layer, rows, new, first) + self._embedded(index, rows * new)
        crossed = 0
        if self._splits(index, token, rows):
            assert isinstance(layer, AttentionLayer)
            seconds -= arithmetic.projection(layer, rows, first)
            return ((Load(LaneName.COMPUTE, 0, seconds + self._hardware.fixed.cell / 2),),)
        if layer.has_cache and not span.decodes:
            seconds += arithmetic.prompt_attention(layer, rows, new, span.length + new)
        elif layer.has_cache:
            # The device attends to its rows while the host attends to its own; what the host is asked and answers
            # crosses the link within the computation.
            layout = self._cache[index, rows]
            seconds += max(arithmetic.token_attention(layout.segments, span.length + 1))
            if layout.host_rows:
                for move in (layout.ask(), layout.answer()):
                    crossed += move.nbytes
                    seconds += self._seconds(move.lane, move.nbytes)
        return ((Load(LaneName.COMPUTE, crossed, seconds + self._hardware.fixed.cell),),)

    def _embedded(self, index: int, tokens: int) -> float:
        """Seconds of decoding the rows of an encoded table, as many as there are ids, or as were gathered."""
        table = self._layers[index].table
        codec = self._placement.codec(table) if table else None
        if table is None or codec is None:
            return 0.0
        rows = min(tokens, table.shape[0]) if self._rows is not None else tokens
        return self._arithmetic.decoding(codec, rows * table.shape[1])

    def _splits(self, index: int, token: int, rows: int) -> bool:
        """Whether a cell is computed in halves."""
        splits = self._splits_attention and self._layers[index].has_cache and self._span(token).decodes
        return splits and bool(self._cache[index, rows].host_rows)

    def _project(self, key: _Key) -> Loads:
        _, index, token, rows, first, _ = key
        if not self._splits(index, token, rows):
            return ()
        layer = self._layers[index]
        assert isinstance(layer, AttentionLayer)
        seconds = self._hardware.fixed.cell / 2 + self._arithmetic.projection(layer, rows, first)
        return ((Load(LaneName.COMPUTE, 0, seconds), self._load(self._cache[index, rows].ask())),)

    def _attend(self, key: _Key) -> Loads:
        _, index, token, rows, *_ = key
        if not self._splits(index, token, rows):
            return ()
        segments = self._cache[index, rows].segments
        device, host = self._arithmetic.token_attention(segments, self._span(token).length + 1)
        chains: Loads = ((Load(LaneName.HOST, 0, host),),)
        if any(segment.on_device for segment in segments):
            chains += ((Load(LaneName.COMPUTE, 0, device),),)
        return chains

    def _load_attended(self, key: _Key) -> Loads:
        _, index, token, rows, *_ = key
        if not self._splits(index, token, rows):
            return ()
        return ((self._load(self._cache[index, rows].answer()),),)

    # Lanes

    def _span(self, token: int) -> Span:
        return self._passes.span(token)

    def _timed_routes(self, routes: Iterable[Route]) -> Loads:
        return tuple(tuple(map(self._load, route.moves)) for route in routes if route.moves)

    def _load(self, move: Move) -> Load:
        return self._move(move.lane, move.nbytes)

    def _move(self, lane: LaneName, nbytes: int) -> Load:
        # What the host does for a device that shares its memory is done by the thread that computes.
        served_by = LaneName.COMPUTE if self._shared and lane is LaneName.HOST else lane
        return Load(served_by, nbytes, self._seconds(lane, nbytes))

    def _seconds(self, lane: LaneName, nbytes: int) -> float:
        fixed = self._hardware.fixed
        on_disk = lane in (LaneName.DISK_READ, LaneName.DISK_WRITE)
        return (fixed.disk_job if on_disk else fixed.stage) + nbytes / self._hardware.bandwidth[lane]
