"""The tokens that a block computes in each pass through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from flexgen.layout.cache import Span
from flexgen.layout.prefix import shared_tokens
from flexgen.layout.topology import LINKED, Topology
from flexgen.policy import Policy
from flexgen.workload import Workload

_CELL_TOKENS = 256
"""About this number of tokens of prompts form a cell. The computation of fewer tokens is slower per token. With more,
attention on the host has nothing to do for a longer time."""

_JOINT_TOKENS = 512
"""If no data moves between cells, one call computes those of a layer with this number of tokens at most. The weights
are read once for all of them, and one product of many rows is faster than several of few. More rows are not faster,
and take more memory (benchmarks/packed_linear.py)."""

LEAST_RIGHT = 0.1
"""A pass computes the guesses of a batch if it may expect at least this number of right ones per row. Guesses are for
passes that wait for data, whose arithmetic has time for more tokens, but not for an amount without a limit."""


class CellSize(NamedTuple):
    """The size of a cell: `new` tokens of each of `rows` rows."""

    rows: int
    new: int

    @property
    def positions(self) -> int:
        return self.rows * self.new


@dataclass(frozen=True)
class Passes:
    """The passes of a block whose longest prompt has `width` tokens.

    The number of a pass is the new token that it computes; 0 is the first one. With `chunk`, a pass computes at most
    `chunk` tokens of each prompt. Passes over the parts before the last one compute no new token and have negative
    numbers. Prompts are divided from their end, so that the same pass computes the first new token of every batch.

    cached: the number of tokens before the prompts that are already in the cache.
    shared: the number of tokens before those of the cache, which are stored once for all rows (see
        `layout/prefix.py`). Spans do not count them.
    guess: the maximum number of guesses that a pass of the decode computes after the newest token of each row.
    longest: the number of tokens of the longest row that may be computed again, in parts, after it was put back to
        wait (`Policy.reserve_new`). 0: none is.
    rows: the maximum number of prompts that a pass computes, in cells of their own; 0: whole batches of prompts are
        computed.
    batches: the number of batches of a full block, between which the cells of `rows` prompts are spread.
    closes_up: see `Topology.closes_up`.
    """

    width: int
    chunk: int = 0
    cached: int = 0
    shared: int = 0
    guess: int = 0
    longest: int = 0
    rows: int = 0
    batches: int = 1
    closes_up: bool = False

    @classmethod
    def of(cls, workload: Workload, policy: Policy, topology: Topology = LINKED) -> Passes:
        """The passes of a block of `workload`, over the tokens that its prompts do not share.

        topology: needed for `closes_up` only.
        """
        shared = shared_tokens(workload, policy)
        width, chunk, longest = workload.prompt_len - shared, policy.prefill_chunk, 0
        if policy.reserves(workload.gen_len):  # a row is computed again in parts that are as long as a prompt
            chunk, longest = chunk or width, width + workload.gen_len - 1
        passes = cls(width, chunk, shared=shared, guess=policy.guess, longest=longest)
        if passes.extends or workload.gen_len == 1:  # parts of prompts, or no rows that decode meanwhile
            return passes
        shape = replace(passes, rows=policy.prefill_rows, batches=policy.num_gpu_batches)
        return replace(shape, closes_up=topology.closes_up(policy))

    @classmethod
    def expected(cls, workload: Workload, policy: Policy) -> Passes:
        """The passes as a run computes them: without guesses if too few of them are right."""
        passes = cls.of(workload, policy)
        if workload.tokens_in_pass(policy.guess) < 1 + LEAST_RIGHT:
            return replace(passes, guess=0)
        return passes

    @property
    def first(self) -> int:
        """The number of the first pass."""
        return self.first_of(self.width)

    def first_of(self, width: int) -> int:
        """The number of the first pass that computes tokens of prompts with `width` tokens."""
        return 1 - self._parts(width)

    @property
    def rows_of_cell(self) -> int:
        """The number of prompts of a cell in which prompts enter, if `rows` limits them.

        There are at most as many cells as batches: cells that alternate with those that decode overlap best with
        attention on the host. If rows close up, the compute device is the host, so nothing overlaps with attention.
        """
        most = max(_CELL_TOKENS // self.width, 1)
        if not self.closes_up:
            most = max(most, -(-self.rows // self.batches))
        return min(most, max(self.rows, 1))

    @property
    def joint_tokens(self) -> int:
        """The maximum number of tokens of cells that one call computes; 0 if each is computed alone.

        On a device with memory of its own, the copies of a cell overlap with the computation of others.
        """
        return _JOINT_TOKENS if self.closes_up else 0

    def together(self, lengths: Sequence[int]) -> bool:
        """Whether prompts of these lengths may form a cell in which prompts enter.

        If rows close up, many prompts may enter in adjacent places, so a cell has more prompts if they are short. It
        has no more positions than the largest of `cells`, for which buffers are made.
        """
        if self.closes_up:
            return len(lengths) * max(lengths) <= self.rows_of_cell * self.width
        return len(lengths) <= self.rows_of_cell

    def cells(self, rows: int) -> tuple[CellSize, ...]:
        """The largest cells that compute a batch of `rows` rows or a part of it: all of its rows, and prompts.

        What exists only during a cell (slots, staging, workspaces) has the size of one of them.
        """
        if not self.rows:
            return (CellSize(rows, self.new),)
        return CellSize(rows, self.decoded), CellSize(min(self.rows_of_cell, rows), self.width)

    def positions(self, rows: int) -> int:
        """The maximum number of tokens of a cell that computes a batch of `rows` rows or a part of it."""
        return max(cell.positions for cell in self.cells(rows))

    @property
    def new(self) -> int:
        """The maximum number of tokens of a row that a pass computes."""
        return max(self._part, self.decoded)

    @property
    def decoded(self) -> int:
        """The maximum number of tokens of a row that a pass of the decode computes."""
        return 1 + self.guess

    @property
    def _part(self) -> int:
        """The maximum number of tokens of a prompt in one pass."""
        return min(self.width, self.chunk or self.width)

    @property
    def extends(self) -> bool:
        """Whether some passes compute several tokens after cached ones."""
        return self._part < max(self.width, self.longest)

    def span(self, token: int, width: int | None = None) -> Span:
        """The tokens that a pass computes of prompts with `width` tokens, at most the width of the block. The span
        has no new tokens if such prompts have fewer parts. For `token` > 0, it is that of a row without guesses
        that were kept."""
        width = width or self.width
        if token > 0:
            return Span(self.cached + width + token - 1, self.decoded, self.guess)
        parts = self._parts(width)
        part = parts - 1 + token
        if part < 0:
            return Span(self.cached, 0)
        begin, end = (width * n // parts for n in (part, part + 1))
        return Span(self.cached + begin, end - begin)

    def capacity(self, gen_len: int) -> int:
        """The number of columns of the cache for `gen_len` new tokens. The last guesses may be beyond them."""
        return self.cached + self.width + gen_len + self.guess

    def _parts(self, width: int) -> int:
        return -(-width // self.chunk) if self.chunk else 1
