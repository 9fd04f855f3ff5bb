"""The GPU batches of a block, and the parts of them that cells compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.runtime.cell import Padding


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one GPU batch, and their places in its columns.

    `rows`: the numbers of the rows. `began`: the pass that computes the first new token of each row after it has
    entered. `lengths`: of their prompts. All rows end in the same column, so shorter rows are padded on the left.
    `ids`: by token, the ids (rows, new) of the prompts in host memory, in the memory for prompts number `room`. A
    batch of rows that have moved together has none.
    `kept`: the number of new tokens that each row had before it entered, which are a part of its prompt then; () if
    none had any. Rows with equal `origins` are adjacent.
    `least_width`: see `width`. `column`: the first column of the prompts, which are a part of a batch.
    """

    rows: tuple[int, ...]
    began: tuple[int, ...]
    lengths: tuple[int, ...]
    device: torch.device
    ids: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    room: int | None = None
    least_width: int = 0
    column: int = 0
    kept: tuple[int, ...] = ()

    @cached_property
    def first(self) -> int:
        """The pass that computed the first new token of the rows that entered first."""
        return min(self.began)

    @cached_property
    def origins(self) -> Sequence[int]:
        """The pass in which each row would have got its new token 0 if it had never been put back."""
        if not self.kept:
            return self.began
        return [began - kept for began, kept in zip(self.began, self.kept, strict=True)]

    @cached_property
    def runs(self) -> list[tuple[slice, int]]:
        """The rows that have equally many new tokens, with the number of tokens that they are behind `first`. It is
        negative for rows that were put back."""
        counts = [(origin, len(list(some))) for origin, some in groupby(self.origins)]
        ends = pairwise(accumulate((count for _, count in counts), initial=0))
        return [(slice(*some), origin - self.first) for some, (origin, _) in zip(ends, counts, strict=True)]

    @cached_property
    def width(self) -> int:
        """The columns before new token 0 of the rows that have the most, at least `least_width`."""
        return max(self.least_width, *self._widths)

    @cached_property
    def _widths(self) -> list[int]:
        return [n - (began - self.first) for n, began in zip(self.lengths, self.began, strict=True)]

    @cached_property
    def padding(self) -> Padding:
        starts = tuple(self.width - width for width in self._widths)
        there = torch.tensor(starts, dtype=torch.int64)
        return Padding(starts, there.to(self.device), there)


class CellRows(NamedTuple):
    """The rows that a cell of a layer computes: those in these places of batch number `number` of the block."""

    number: int
    places: range
    batch: Batch
