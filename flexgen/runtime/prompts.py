"""The prompts of a call in their GPU batches: which rows a batch has, and which of their tokens a pass computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, chain, groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from flexgen.layout.cache import Span
from flexgen.layout.hidden import IdLayout
from flexgen.layout.passes import Passes
from flexgen.layout.plan import SLOTS
from flexgen.memory.machine import Machine
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.results.report import Stage
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.compaction import Moved
from flexgen.runtime.guesses import Guesses


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one GPU batch, and their places in its columns.

    `rows`: the numbers of the rows. `began`: the pass that computes new token 0 of each row; equal ones are adjacent.
    `lengths`: of their prompts. All rows end in the same column, so rows that are shorter are padded on the left.
    `ids`: by token, the ids (rows, new) of the prompts in host memory, in the memory for prompts number `room`. A
    batch of rows that have moved together has none.
    """

    rows: tuple[int, ...]
    began: tuple[int, ...]
    lengths: tuple[int, ...]
    device: torch.device
    ids: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    room: int | None = None

    @cached_property
    def first(self) -> int:
        """The pass that computed new token 0 of the rows that have the most."""
        return min(self.began)

    @cached_property
    def runs(self) -> list[tuple[slice, int]]:
        """The rows that have equally many new tokens, with the number of tokens that they are behind the others."""
        counts = [(began, len(list(some))) for began, some in groupby(self.began)]
        ends = pairwise(accumulate((count for _, count in counts), initial=0))
        return [(slice(*some), began - self.first) for some, (began, _) in zip(ends, counts, strict=True)]

    @cached_property
    def width(self) -> int:
        """The columns before new token 0 of the rows that have the most."""
        return max(self._widths)

    @cached_property
    def _widths(self) -> list[int]:
        return [n - (began - self.first) for n, began in zip(self.lengths, self.began, strict=True)]

    @cached_property
    def padding(self) -> Padding:
        starts = tuple(self.width - width for width in self._widths)
        there = torch.tensor(starts, dtype=torch.int64)
        return Padding(starts, there.to(self.device), there)


class _PromptIds:
    """The ids of prompts, and host memory (`rooms`) for those of the batches that are computed next."""

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        passes: Passes,
        pad_id: int,
        rooms: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._prompts = prompts
        self._passes = passes
        self.pad_id = pad_id
        self.rooms = rooms
        self._device = device

    def batch(self, rows: Sequence[int], room: int, began: int) -> Batch:
        """A batch of prompts that are computed next, with padded ids in memory number `room`."""
        lengths = tuple(len(self._prompts[row]) for row in rows)
        width = max(lengths)
        ids = torch.full((len(rows), width), self.pad_id)
        for row, n in zip(ids, rows, strict=True):
            row[width - len(self._prompts[n]) :] = torch.from_numpy(self._prompts[n])
        parts, into = {}, self.rooms[room]
        for token in range(self._passes.first, 1):
            span = self._passes.span(token, width)
            begin, new = span.length - self._passes.cached, span.new
            part = into[len(rows) * begin : len(rows) * (begin + new)].view(len(rows), new)
            parts[token] = part.copy_(ids[:, begin : begin + new])
        return Batch(tuple(rows), (began,) * len(rows), lengths, self._device, parts, room)


class Prompts:
    """The prompts of one block, left-padded to one width per batch, and the newest id of every row.

    batches: the number of rows of each GPU batch, in order. `self.batches` are the numbers of these rows. Prompts
    beyond them wait for a place in the block: `waiting` has them in batches of the size of the first.
    passes: the passes for the longest prompt. If the cache has tokens before `prompts`, all prompts must have the
    same length. `made`: the newest ids (rows,) that the compute device has chosen for each batch, which the host may
    not have yet.

    Pass 0 computes the first new token of the prompts that have begun together. Prompts that enter later use the
    numbers of the other rows' passes.

    `guesses`: None if the decode makes none. With guesses, a pass may have several new tokens of a row, and rows do
    not move to other batches.
    """

    @whole_or_closed
    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        batches: Sequence[int],
        passes: Passes,
        pad_id: int,
        machine: Machine,
        slots: int = SLOTS,
    ) -> None:
        self._taken = Taken()
        self.device = machine.device
        self.lengths = [len(prompt) for prompt in prompts]
        self._passes = replace(passes, guess=0)  # those of the decode depend on `guesses`
        seated = sum(batches)
        groups = [list(range(a, b)) for a, b in pairwise(accumulate(batches, initial=0))]
        later = range(seated, len(prompts))
        self.waiting = [list(later[n : n + batches[0]]) for n in range(0, len(later), batches[0])]
        later_sizes = [self._positions(rows) for rows in self.waiting]
        sizes = [self._positions(rows) for rows in groups]
        sizes = [max([size, *later_sizes]) for size in sizes]
        buffer = self._taken.buffer(machine.host, (sum(sizes) + seated) * torch.int64.itemsize, "prompts")
        *rooms, self.newest = buffer.view(torch.int64).split([*sizes, seated])
        self.newest.zero_()
        self._ids = _PromptIds(prompts, passes, pad_id, rooms, self.device.torch_device)
        self._batches = [self._ids.batch(rows, k, 0) for k, rows in enumerate(groups)]
        self._slots = [
            torch.zeros(
                max([*sizes, max(batches) * passes.decoded]),
                dtype=torch.int64,
                device=self.device.torch_device,
            )
            for _ in range(0 if self.device.shares_host_memory else slots)
        ]
        self.made: dict[int, Tensor] = {}
        self._entered = False
        self.guesses: Guesses | None = None

    def _positions(self, rows: Sequence[int]) -> int:
        """The positions of the prompts of a batch, including padding."""
        return len(rows) * max(self.lengths[row] for row in rows)

    @property
    def prompt_positions(self) -> int:
        """The positions of the prompts in the block and of those that wait, including padding."""
        return sum(map(self._positions, (*self.batches, *self.waiting)))

    @property
    def pad_id(self) -> int:
        return self._ids.pad_id

    @property
    def places(self) -> int:
        """The number of batches for which the block has room."""
        return len(self._ids.rooms)

    @property
    def stage(self) -> Stage:
        """The stage of the block with the present batches."""
        if not self._entered:
            return Stage.FILL
        return Stage.STEADY if self.waiting else Stage.DRAIN

    @property
    def batches(self) -> list[list[int]]:
        """The rows in each batch."""
        return [list(batch.rows) for batch in self._batches]

    def batch(self, number: int) -> Batch:
        """A batch of the block."""
        return self._batches[number]

    @property
    def first(self) -> int:
        """The number of the first pass."""
        return self._passes.first

    def cell(self, number: int, layer: int, batch: int, slot: int) -> BoundCell:
        """A cell of pass `number`, with its tokens: first the prompts or their parts, then one token per pass."""
        token, padding = number - self._batches[batch].first, self._batches[batch].padding
        if self.guesses is None or token < 1:
            return BoundCell(token, layer, batch, slot, self._span(number, batch), padding, number)
        new = self.guesses.bind(self._batches[batch], token)
        return BoundCell(token, layer, batch, slot, new.span, padding, number, guesses=new)

    def _span(self, number: int, batch: int) -> Span:
        return self._passes.span(number - self._batches[batch].first, self._batches[batch].width)

    @property
    def shared(self) -> int:
        """The number of tokens before the prompts, which all rows share."""
        return self._passes.shared

    def passes_left(self, number: int, tokens: int) -> int:
        """The number of passes from `number` on until some row has all of its `tokens` new tokens."""
        return tokens - number + min(batch.first for batch in self._batches)

    @property
    def newest_begins(self) -> int:
        """The pass that computes the first new token of the prompts that have entered last."""
        return max(batch.first for batch in self._batches)

    def entering(self, number: int) -> list[int]:
        """The batches whose prompts are not computed yet before pass `number`."""
        return [k for k, batch in enumerate(self._batches) if batch.first >= number]

    def restart(self, batches: Sequence[Sequence[int]]) -> int | None:
        """The number of the next pass if only waiting prompts are left, which begin together; None otherwise."""
        here = {row for batch in self._batches for row in batch.rows}
        if any(row in here for rows in batches for row in rows):
            return None
        return self._passes.first_of(max(self.lengths[row] for rows in batches for row in rows))

    def began(self) -> dict[int, int]:
        """The pass that computes new token 0 of each row in the block."""
        return {
            row: began for batch in self._batches for row, began in zip(batch.rows, batch.began, strict=True)
        }

    def regroup(self, batches: Sequence[Sequence[int]], number: int) -> list[Moved]:
        """Continue from pass `number` with only these rows in the block.

        A batch has rows of the block, or a batch of `waiting`, whose prompts enter. Returns the origin of the rows of
        each batch.
        """
        old = self._batches
        places = {row: (k, n) for k, batch in enumerate(old) for n, row in enumerate(batch.rows)}
        order = {row: n for n, row in enumerate(chain.from_iterable(batch.rows for batch in old))}
        lengths = tuple(self._span(number, k).length for k in range(len(old)))
        before = {batch.rows: k for k, batch in enumerate(old)}
        began = self.began()
        made: list[Batch] = []
        used = {old[before[tuple(rows)]].room for rows in batches if tuple(rows) in before}
        rooms = [room for room in range(self.places) if room not in used]
        for rows in batches:
            if rows[0] not in began:
                self.waiting.remove(list(rows))
                self._entered = True
                first = self._passes.first_of(max(self.lengths[row] for row in rows))
                made.append(self._ids.batch(rows, rooms.pop(0), max(number - first, 0)))
            elif tuple(rows) in before:
                made.append(old[before[tuple(rows)]])
            else:
                by_age = tuple(sorted(rows, key=began.__getitem__))
                own = tuple(began[row] for row in by_age), tuple(self.lengths[row] for row in by_age)
                made.append(Batch(by_age, *own, self.device.torch_device))
        self._batches = made
        # A prompt that enters has no newest id yet, so any id will do.
        newest = [order.get(row, 0) for row in chain.from_iterable(batch.rows for batch in made)]
        self.newest[: len(newest)] = self.newest[newest]
        return [
            Moved((), lengths, 0, None, len(batch.rows))
            if batch.rows[0] not in began
            else Moved(
                tuple(places[row] for row in batch.rows),
                lengths,
                self._span(number, k).length,
                before.get(batch.rows),
            )
            for k, batch in enumerate(made)
        ]

    def close(self) -> None:
        self._taken.close()

    def source(self, cell: BoundCell) -> Tensor:
        """(rows, new) in host memory: ids of the prompt for the first token, later the newest id and guesses."""
        if cell.guesses is not None:
            return cell.guesses.computed
        if cell.token > 0:
            return self.newest[self.rows(cell.batch)].unsqueeze(1)
        return self._batches[cell.batch].ids[cell.token]

    def load(self, cell: BoundCell) -> Chains:
        """The work that loads the ids of the cell to the compute device."""
        source, rows = self.source(cell), len(self._batches[cell.batch].rows)
        routes = IdLayout(rows, self.device.topology).load(cell.span.new)
        if not routes:
            return ()
        target = self._slots[cell.slot][: source.numel()].view(source.shape)
        return bind(routes, lambda _, move: partial(self.device.to_device, target, source))

    def take(self, cell: BoundCell) -> Tensor:
        """The ids (rows, new) on the compute device, after `load`."""
        source = self.source(cell)
        if self.device.shares_host_memory:
            return source
        return self._slots[cell.slot][: source.numel()].view(source.shape)

    def fed(self, batch: int) -> Tensor:
        """The ids (rows, 1) for the next token on the compute device, from `made`, not from the host.

        A row that has ended continues with its chosen id, and a row without a valid id with id 0. The host does not
        use their results.
        """
        return self.made[batch].clamp_min(0).unsqueeze(1)

    def rows(self, batch: int) -> slice:
        """The rows of `batch` in `newest`."""
        begin = sum(len(before.rows) for before in self._batches[:batch])
        return slice(begin, begin + len(self._batches[batch].rows))

    def positions(self, cell: BoundCell) -> Tensor:
        """(rows, new) on the compute device, counted from the row's first token, which may be in a shared prefix.
        Padding has the position of the first token that is not."""
        span, device = cell.span, self.device.torch_device
        if cell.guesses is None:
            columns = torch.arange(span.length, span.length + span.new, device=device)
        else:  # a guess after the last token has its position: the model may have no other
            assert self.guesses is not None
            columns = cell.guesses.lengths.to(device)[:, None] + torch.arange(span.new, device=device)
            columns.clamp_(max=self._batches[cell.batch].width + self.guesses.tokens - 1)
        positions = (columns - cell.padding.on_device[:, None]).clamp_(min=0)
        return positions.add_(self._passes.shared) if self._passes.shared else positions

    def text_length(self, cell: BoundCell) -> Tensor | None:
        """See `Context`. It is the length of the prompt if the cell computes a part of the prompt."""
        if cell.token > 0 or self.first == 0:
            return None
        length = self._passes.shared + self._passes.cached + self._batches[cell.batch].width
        return torch.full((), length, device=self.device.torch_device)
