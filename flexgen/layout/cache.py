"""The KV cache of a batch in one layer: the pages of its rows on each tier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from flexgen.kernels.attention import MASK_ALIGNMENT, join_bytes
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.sparse_attention import Sparsity
from flexgen.layout.moves import Kind, Move, Route, Routes
from flexgen.layout.topology import Topology
from flexgen.models.spec import AttentionSpec, CacheShape
from flexgen.policy import Policy, Tier
from flexgen.quant import head_format
from flexgen.results.trace import LaneName
from flexgen.units import BLOCK, align


@dataclass(frozen=True)
class CacheSegment:
    """The KV cache of some rows of one batch in one layer: pages of (2, rows, kv_heads, tokens, heads.width).

    A page is contiguous even when it is partly filled: attention reads it in place, and it moves as one block.
    `on_device`: whether the compute device computes attention over it; otherwise the host does. `resident`: whether
    it is stored where attention reads it, so that it never moves. `dtype` is that of the computation, and `codec`
    names the format of the heads.
    `sparsity`: the rule that chooses the cached tokens of a decode step. On disk, it chooses whole disk blocks.
    `window`: the number of tokens that attention reads, if the pages are a ring. Page n of a ring is stored in the
    place n % pages, over a page that no later token reads. None: the pages hold all tokens.
    """

    tier: Tier
    rows: range
    on_device: bool
    resident: bool
    pages: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    codec: str = "none"
    sparsity: Sparsity = Sparsity(1.0)
    window: int | None = None

    @cached_property
    def heads(self) -> HeadFormat:
        """The format of a head's key or value in a page."""
        return head_format(self.codec, self.head_dim, self.dtype)

    def grows(self, topology: Topology) -> bool:
        """Whether its memory can be taken page by page: host memory in which attention reads it."""
        return self.resident and (topology.shares_host_memory or self.tier is Tier.CPU)

    @property
    def sparse(self) -> bool:
        return self.sparsity.share < 1

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """The shape of a page, in elements of `heads.dtype`."""
        return 2, len(self.rows), self.kv_heads, self.page_tokens, self.heads.width

    @property
    def page_bytes(self) -> int:
        """Bytes between the beginnings of adjacent pages: whole disk blocks."""
        return align(self.token_bytes(self.page_tokens), BLOCK)

    @property
    def nbytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def capacity(self) -> int:
        """The number of tokens of a row for which it has room."""
        return self.pages * self.page_tokens

    def full_pages(self, length: int) -> range:
        """The numbers of the full pages that are kept of `length` tokens."""
        whole = length // self.page_tokens
        # One place of a ring belongs to the page that is being filled.
        return range(0 if self.window is None else max(whole - self.pages + 1, 0), whole)

    def place(self, page: int) -> int:
        """The offset of page number `page`, in bytes."""
        return page % self.pages * self.page_bytes

    def runs(self, pages: range) -> list[slice]:
        """The bytes of the pages with these numbers, at most `self.pages` of them, in one or two runs."""
        if not pages:
            return []
        first = pages.start % self.pages
        cut = min(len(pages), self.pages - first)
        parts = [(first, first + cut), (0, len(pages) - cut)]
        return [slice(a * self.page_bytes, b * self.page_bytes) for a, b in parts if a < b]

    def stored(self, new: int) -> int:
        """The number of the last of `new` tokens that are stored."""
        return new if self.window is None else min(new, self.capacity)

    def read(self, length: int) -> int:
        """The number of tokens that attention reads if `length` exist."""
        return length if self.window is None else min(length, self.window)

    def token_bytes(self, tokens: int) -> int:
        """Stored bytes of the keys and values of `tokens` tokens of all rows, without padding."""
        return 2 * len(self.rows) * self.kv_heads * tokens * self.heads.nbytes

    def filled(self, length: int) -> tuple[int, int]:
        """Bytes of the full pages that are kept of `length` tokens, and of the page that is being filled."""
        return len(self.full_pages(length)) * self.page_bytes, bool(
            length % self.page_tokens
        ) * self.page_bytes

    def flushed(self, span: Span) -> int:
        """Bytes of the pages on disk that a step completes."""
        return len(self.flushed_pages(span)) * self.page_bytes if self.tier is Tier.DISK else 0

    def flushed_pages(self, span: Span) -> range:
        """The numbers of the pages that a step completes and that later tokens read."""
        before, after = span.pages(self.page_tokens)
        return range(max(before, self.full_pages(span.length + span.new).start), after)

    def loads_only_keys(self, topology: Topology) -> bool:
        """Whether a decode step loads the keys in advance, and the chosen values while it computes attention."""
        return self.sparse and (topology.shares_host_memory or not self.on_device)

    def workspace_bytes(self, new: int) -> int:
        """Temporary bytes to encode `new` tokens of each row, and to decode a page on the CPU."""
        heads = len(self.rows) * self.kv_heads
        return self.heads.workspace_bytes(heads, max(new, self.page_tokens))

    def extending_bytes(self, new: int) -> int:
        """Temporary bytes of attention of `new` tokens after cached ones: joined and decoded pages of one row. For a
        ring, which the new tokens overwrite, the tokens of all rows are joined before."""
        if self.window is not None:
            tokens = self.window - 1 + new
            return self.token_bytes(tokens) + self.heads.decode_bytes(self.kv_heads, tokens, self.dtype)
        tokens = self.pages * self.page_tokens
        joined = 2 * self.kv_heads * tokens * self.heads.nbytes if self.pages > 1 else 0
        return joined + self.heads.decode_bytes(self.kv_heads, tokens, self.dtype)

    def device_bytes(self) -> int:
        """Temporary bytes of attention on a GPU: joined and decoded pages."""
        rows, tokens = len(self.rows), self.pages * self.page_tokens
        joined = 0
        if self.pages > 1:
            nbytes = self.token_bytes(tokens)
            joined = nbytes if self.sparse else join_bytes(rows, nbytes, self.heads)
        return joined + self.heads.decode_bytes(rows * self.kv_heads, tokens, self.dtype)

    def mask_bytes(self) -> int:
        """Bytes of the padding mask on a GPU."""
        tokens = align(self.pages * self.page_tokens, MASK_ALIGNMENT)
        return len(self.rows) * tokens * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """The tokens of one step: `length` are cached, `new` are computed. The first step has no cached tokens.

    guessed: the last of the new tokens that are guesses. With guesses, rows have different numbers of cached tokens,
    and `length` is that of the longest row or more.
    """

    length: int
    new: int
    guessed: int = 0

    @property
    def decodes(self) -> bool:
        """Whether it computes one token, and guesses of the next ones, after cached ones. Only for these steps does
        the host compute attention, and only in them is attention sparse: with more new tokens, attention is
        compute-bound."""
        return self.length > 0 and self.new == 1 + self.guessed

    @property
    def extends(self) -> bool:
        """Whether it computes several tokens after cached ones."""
        return self.length > 0 and self.new > 1 + self.guessed

    def pages(self, page_tokens: int) -> tuple[int, int]:
        """The numbers of the pages for the first new token and for the first token of the next step."""
        return self.length // page_tokens, (self.length + self.new) // page_tokens


_PROMPT = Span(0, 1)
"""A step after which all new tokens of a moving segment leave the device."""


@dataclass(frozen=True)
class CacheLayout:
    """The KV cache of one batch in one layer: the moves of a step from home to attention, and back home.

    query_bytes: the size of the queries of one token of one row, in the dtype of the computation.
    """

    segments: tuple[CacheSegment, ...]
    query_bytes: int
    topology: Topology

    def load(self, span: Span) -> Routes:
        """The routes of the cached tokens to the memory in which attention reads them."""
        routes = (self.inward(s, span, *s.filled(span.length)) for s in self.moving(span))
        return tuple(route for route in routes if route.moves)

    def moving(self, span: Span) -> list[CacheSegment]:
        """The segments whose cached tokens must move for the step's attention."""
        if not span.length:
            return []
        return [s for s in self.loaded if not s.resident or span.extends]

    @cached_property
    def loaded(self) -> tuple[CacheSegment, ...]:
        """The segments whose cached tokens move in some steps."""
        return tuple(s for s in self.segments if not (s.resident and s.on_device))

    def inward(self, segment: CacheSegment, span: Span, pages: int, tail: int) -> Route:
        """The route of `pages` bytes of full pages and `tail` bytes of the page that is being filled, which stays in
        memory."""
        moves: tuple[Move, ...] = ()
        if segment.loads_only_keys(self.topology) and span.decodes:
            pages //= 2
        if segment.tier is Tier.DISK and pages:
            moves += (Move(LaneName.DISK_READ, pages, Kind.READ),)
        if segment.on_device or span.extends:
            moves += tuple(Move(lane, pages + tail) for lane in self.topology.to_device)
        return Route(segment.tier, moves)

    def store(self, span: Span) -> Routes:
        """The routes of the new keys and values to their homes."""
        routes = (self.outward(segment, span, segment.flushed(span)) for segment in self.stored)
        return tuple(route for route in routes if route.moves)

    @cached_property
    def stored(self) -> tuple[CacheSegment, ...]:
        """The segments whose new tokens move in some steps."""
        return tuple(
            s for s in self.segments if s.tier is Tier.DISK or leaves_device(s, _PROMPT, self.topology)
        )

    def outward(self, segment: CacheSegment, span: Span, flushed: int) -> Route:
        """The route of new keys and values, and of `flushed` bytes of completed pages."""
        moves: tuple[Move, ...] = ()
        if leaves_device(segment, span, self.topology):
            fresh = segment.token_bytes(segment.stored(span.new))
            moves += tuple(Move(lane, fresh) for lane in self.topology.from_device)
            moves += (Move(LaneName.HOST, fresh, Kind.PUT),)
        if flushed:
            moves += (Move(LaneName.DISK_WRITE, flushed, Kind.WRITE),)
        return Route(segment.tier, moves)

    @property
    def host_rows(self) -> int:
        """The number of rows whose attention the host computes."""
        return sum(len(segment.rows) for segment in self.segments if not segment.on_device)

    def ask(self, new: int = 1) -> Move:
        """The move of the queries, new keys and new values of `new` tokens of the host's rows from the device."""
        kv_bytes = self.segments[0].kv_heads * self.segments[0].head_dim * self.segments[0].dtype.itemsize
        return Move(LaneName.FROM_DEVICE, self.host_rows * new * (self.query_bytes + 2 * kv_bytes))

    def answer(self, in_part: bool = False, new: int = 1) -> Move:
        """The move of the host's results to the device. in_part: as for `answer_bytes`."""
        return Move(LaneName.TO_DEVICE, self.host_rows * new * self.answer_bytes(in_part))

    def answer_bytes(self, in_part: bool) -> int:
        """The size of the host's result for one token of one row. in_part: whether the device attends to other tokens
        of the row, so that the result has the log-sum-exp of each head, in float32."""
        head = self.segments[0].head_dim * self.segments[0].dtype.itemsize
        return self.query_bytes + in_part * (self.query_bytes // head) * torch.float32.itemsize


def leaves_device(segment: CacheSegment, span: Span, topology: Topology) -> bool:
    """Whether new keys and values must leave a separate compute device after attention.

    If the host computes attention over one new token, it already has them.
    """
    own = not topology.shares_host_memory and segment.tier is not Tier.GPU
    return own and (segment.on_device or not span.decodes)


def cache_layout(
    attention: AttentionSpec,
    policy: Policy,
    rows: int,
    capacity: int,
    dtype: torch.dtype,
    topology: Topology,
) -> CacheLayout:
    """The layout of a batch of `rows` prompts of at most `capacity` tokens each, in a layer with this attention."""
    segments = cache_segments(attention.cache, policy, rows, capacity, dtype, topology)
    return CacheLayout(segments, attention.q_size * dtype.itemsize, topology)


def cache_segments(
    shape: CacheShape, policy: Policy, rows: int, capacity: int, dtype: torch.dtype, topology: Topology
) -> tuple[CacheSegment, ...]:
    """The segments that store `capacity` tokens of each of a batch's `rows` prompts, one for each tier with rows.

    The rows of a tier depend only on the policy, so they are the same for every layer. With a window, a segment has
    the pages of a ring if they are fewer. Attention with a window is never sparse: it reads few tokens anyway. With
    guesses there are no rings: a guess that is not kept would have overwritten a token that is still read. Nor are
    there any if prompts enter in the places of single rows.
    """
    share = policy.attn_sparsity if shape.window is None else 1.0
    segments = []
    for tier, part in policy.cache.rows(rows).items():
        if not part:
            continue
        on_device = tier is Tier.GPU or not topology.host_attends(policy)
        resident = topology.in_place(tier) or (tier is Tier.CPU and not on_device)
        codec = policy.cache[tier].codec
        form = head_format(codec, shape.head_dim, dtype)
        page_tokens = topology.pieces.memory_page_tokens
        if tier is Tier.DISK:
            page_tokens = topology.pieces.tokens_on_disk(2 * len(part) * shape.kv_heads, form.nbytes)
        # Wherever a window begins in a page, its tokens are in that many pages.
        ring = -(-(shape.window.size - 1) // page_tokens) + 1 if shape.window else 0
        rings = shape.window is not None and not policy.lengths_differ and ring * page_tokens < capacity
        window = shape.window.size if shape.window and rings else None
        if window is None and tier is Tier.GPU and not topology.shares_host_memory:
            page_tokens = capacity  # it never moves, and a GPU processes all of it at once
        pages = ring if window else -(-capacity // page_tokens)
        if window is None:
            page_tokens = -(-capacity // pages)  # equal pages: no page is mostly empty
        choice = 1
        if tier is Tier.DISK and share < 1:
            choice = topology.pieces.chosen_together(shape.head_dim * dtype.itemsize)
            page_tokens = align(page_tokens, choice)
            pages = -(-capacity // page_tokens)
        sizes = pages, page_tokens, shape.kv_heads, shape.head_dim
        sparsity = Sparsity(share, choice)
        segments.append(CacheSegment(tier, part, on_device, resident, *sizes, dtype, codec, sparsity, window))
    return tuple(segments)
