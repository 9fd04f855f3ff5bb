"""The memory needs of a batch's KV cache in all layers, which may have different kinds of attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from flexgen.kernels.shared_prefix import SCORE_VALUES
from flexgen.layout.cache import CacheLayout, CacheSegment, cache_layout
from flexgen.layout.needs import Need
from flexgen.layout.passes import CellSize, Passes
from flexgen.layout.topology import Topology
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer
from flexgen.models.spec import AttentionSpec
from flexgen.policy import Policy, Tier
from flexgen.units import BLOCK, align


@dataclass(frozen=True)
class BatchCache:
    """The cache of one batch. kinds: the number of layers with each kind of attention. layouts: one for each kind."""

    kinds: Mapping[AttentionSpec, int]
    layouts: tuple[CacheLayout, ...]
    rows: int
    topology: Topology

    @property
    def _by_tier(self) -> Iterator[tuple[CacheSegment, ...]]:
        """For each tier with rows, the segments of the different kinds. All kinds have the same rows on a tier."""
        return zip(*(layout.segments for layout in self.layouts), strict=True)

    @property
    def whole_segments(self) -> dict[AttentionSpec, CacheSegment]:
        """The segment of all rows for each kind of attention, if the rows are on one tier."""
        segments = (layout.segments for layout in self.layouts)
        return {own: segment for own, (segment,) in zip(self.kinds, segments, strict=True)}

    @property
    def _linked(self) -> bool:
        return not self.topology.shares_host_memory

    def growing(self, columns: int) -> dict[Tier, int]:
        """Bytes of the pages with `columns` tokens of each row, by tier whose memory can be taken page by page."""
        return {
            segments[0].tier: sum(
                layers * min(-(-columns // s.page_tokens), s.pages) * s.page_bytes
                for layers, s in zip(self.kinds.values(), segments, strict=True)
            )
            for segments in self._by_tier
            if segments[0].grows(self.topology)
        }

    def largest_home(self, tier: Tier) -> int:
        """Bytes of the rows on a tier in the layer that stores most."""
        return max(s.nbytes for segments in self._by_tier for s in segments if s.tier is tier)

    def homes(self, pooled: bool = False) -> list[Need]:
        """Bytes that stay allocated from the first token to the last. pooled: without the pages that `growing`
        counts."""
        needs, counts = [], self.kinds.values()
        for segments in self._by_tier:
            tier = segments[0].tier
            home = sum(layers * segment.nbytes for layers, segment in zip(counts, segments, strict=True))
            if not (pooled and segments[0].grows(self.topology)):
                needs.append(Need(tier, "cache", "home", home))
            if segments[0].on_device and self._linked:  # one mask serves all layers
                needs.append(Need(Tier.GPU, "cache", "workspace", max(s.mask_bytes() for s in segments)))
            if tier is Tier.DISK:  # the pages that are being filled
                filled = sum(layers * s.page_bytes for layers, s in zip(counts, segments, strict=True))
                needs.append(Need(Tier.CPU, "cache", "staging", filled))
        return needs

    def in_flight(self, passes: Passes, slots: int, hidden_bytes: int) -> list[Need]:
        """The needs of `slots` cells. All layers use the same slots, so a slot is as large as the largest layer
        needs.

        hidden_bytes: the size of the hidden states of one token of one row.
        """
        needs = [need for segments in self._by_tier for need in self._of_tier(segments, passes, slots)]
        needs.append(Need(Tier.GPU, "cache", "workspace", self.passing_bytes(passes)))
        if asked := self.layouts[0].host_rows:
            new, part = passes.decoded, bool(passes.shared)
            answer = slots * max(layout.answer_bytes(part) * new for layout in self.layouts)
            qkv = slots * max(layout.ask(new).nbytes for layout in self.layouts) // asked
            needs.append(Need(Tier.CPU, "cache", "staging", asked * (qkv + answer)))
            needs.append(Need(Tier.GPU, "cache", "slots", asked * answer))
            # Between the halves of a layer: its input, queries, keys and values, and the copies that leave.
            between = slots * hidden_bytes * new + qkv
            needs.append(Need(Tier.GPU, "cache", "workspace", self.rows * between + asked * qkv))
        return needs

    def passing_bytes(self, passes: Passes) -> int:
        """Temporary bytes to encode, join and decode keys and values on the device, one tier after another."""
        segments = [segment for segments in self._by_tier for segment in segments]
        there = [s.device_bytes() for s in segments if s.on_device and self._linked]
        there += [s.extending_bytes(passes.new) for s in segments if passes.extends]
        there += [_part(s, cell).workspace_bytes(cell.new) for s in segments for cell in _cells(s, passes)]
        return max(there)

    def _of_tier(self, segments: tuple[CacheSegment, ...], passes: Passes, slots: int) -> Iterator[Need]:
        tier, on_device = segments[0].tier, segments[0].on_device
        largest = max(segment.nbytes for segment in segments)
        if tier is Tier.DISK:
            yield Need(Tier.CPU, "cache", "slots", slots * largest)
        # Parts of prompts are computed on the device for the host's rows too.
        if (on_device or passes.extends) and self._linked and not self.topology.in_place(tier):
            yield Need(Tier.GPU, "cache", "slots", slots * largest)
        choices = [
            _choice_bytes(s, own.heads) for s, own in zip(segments, self.kinds, strict=True) if s.sparse
        ]
        if choices:
            yield Need(Tier.GPU if on_device else Tier.CPU, "cache", "workspace", max(choices))
        if tier is not Tier.GPU and self._linked:
            fresh = max(new_bytes(segment, passes) for segment in segments)
            yield Need(Tier.CPU, "cache", "staging", slots * align(fresh, BLOCK))
            yield Need(Tier.GPU, "cache", "workspace", slots * fresh)

    def gathered(self, capacity: int) -> dict[Tier, int]:
        """Temporary bytes on the device and in host memory while rows move to a batch.

        They consist of the batch's keys and values in one layer and of the page that is copied.
        """
        taken = {Tier.GPU: 0, Tier.CPU: 0}
        for segments in self._by_tier:
            on = Tier.CPU if self._linked and segments[0].tier is not Tier.GPU else Tier.GPU
            taken[on] += max(segment.token_bytes(segment.stored(capacity)) for segment in segments)
        page = 2 * max(segment.page_bytes for segments in self._by_tier for segment in segments)
        return {tier: nbytes and nbytes + page for tier, nbytes in taken.items()}


def kinds_of_attention(layers: Iterable[Layer]) -> Counter[AttentionSpec]:
    """The number of layers with each kind of attention."""
    return Counter(layer.layer_spec.attention for layer in layers if isinstance(layer, AttentionLayer))


def batch_cache(
    kinds: Mapping[AttentionSpec, int],
    policy: Policy,
    rows: int,
    capacity: int,
    dtype: torch.dtype,
    topology: Topology,
) -> BatchCache:
    """The cache of a batch of `rows` prompts of at most `capacity` tokens each."""
    layouts = (cache_layout(own, policy, rows, capacity, dtype, topology) for own in kinds)
    return BatchCache(kinds, tuple(layouts), rows, topology)


def new_bytes(segment: CacheSegment, passes: Passes) -> int:
    """Bytes of the new keys and values of the segment's rows in the cell that has most."""
    cells = _cells(segment, passes)
    return max(_part(segment, cell).token_bytes(segment.stored(cell.new)) for cell in cells)


def _cells(segment: CacheSegment, passes: Passes) -> Iterable[CellSize]:
    """The largest cells of the segment's rows."""
    return passes.cells(len(segment.rows))


def _part(segment: CacheSegment, cell: CellSize) -> CacheSegment:
    """The segment of the rows of a cell."""
    return segment if cell.rows == len(segment.rows) else replace(segment, rows=range(cell.rows))


def merging_bytes(own: AttentionSpec, tokens: int, shared: int) -> int:
    """Temporary bytes of attention of `tokens` new tokens over a prefix of `shared` tokens, and of the merge with
    attention over the rows' own tokens.

    They consist of three results in float32, and of the scores of some queries: a product, scores and probabilities
    in float32, and copies in the dtype of the computation.
    """
    queries = tokens * own.heads
    scores = max(min(SCORE_VALUES, queries * shared), own.heads * shared)
    return torch.float32.itemsize * (3 * queries * (own.head_dim + 1) + 5 * scores)


def _choice_bytes(segment: CacheSegment, heads: int) -> int:
    """The maximum bytes for the choice of tokens in torch, in addition to dense attention, at the last token."""
    most = segment.sparsity.most(segment.pages * segment.page_tokens)
    # For each token: the index of its block, its position before and after padding, two weights, three flags.
    return len(segment.rows) * heads * most * (3 * torch.int64.itemsize + 2 * torch.float32.itemsize + 3)
