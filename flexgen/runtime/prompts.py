"""The prompts of a call in their GPU batches: which rows a batch has, and which of their tokens a pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, pairwise

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
from flexgen.runtime.batches import Batch, CellRows
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.compaction import Moved, Reseated
from flexgen.runtime.guesses import Guesses
from flexgen.runtime.prompt_ids import PromptIds
from flexgen.runtime.seating import Seating
from flexgen.schedule.admission import between, closed_up, entry_cells, joint_cells, movers, reseated


class Prompts:
    """The prompts of one block, left-padded to one width per batch, and the newest id of every row.

    batches: the number of rows of each GPU batch, in order. `self.batches` are the numbers of these rows. Prompts
    beyond them wait for a place in the block: `waiting` has them in batches of the size of the first.
    passes: the passes for the longest prompt. If the cache has tokens before `prompts`, all prompts must have the
    same length. `made`: the newest ids (rows,) that the compute device has chosen for each batch, which the host may
    not have yet.

    Pass 0 computes the first new token of the prompts that have begun together. Prompts that enter later use the
    numbers of the other rows' passes.

    `guesses`: None if the decode makes none. With guesses, a pass may have several new tokens of a row, so the rows
    of a batch have different numbers of them. Their prompts end in the same column, in each batch that they are in.
    `seating`: decides which rows have places in the block. None if the cache has pages for all of their tokens.

    With `passes.rows`, prompts enter in the places of single rows, in cells of their own: at most that number in a
    pass. Each row has its own number of cached tokens, which `guesses` keeps. `seat` replaces `regroup`.
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
        self._passes = replace(passes, guess=0)  # those of the decode depend on `guesses`
        seated = sum(batches)
        groups = [list(range(a, b)) for a, b in pairwise(accumulate(batches, initial=0))]
        later = range(seated, len(prompts))
        together = 1 if passes.rows else batches[0]
        self.waiting = [list(later[n : n + together]) for n in range(0, len(later), together)]

        def positions(rows: Sequence[int]) -> int:
            return len(rows) * max(len(prompts[row]) for row in rows)

        again = max(batches) * passes.longest  # any batch may be one of rows that were put back
        sizes = [max(again, *map(positions, (rows, *self.waiting))) for rows in groups]
        if passes.rows:
            sizes = [len(rows) * passes.width for rows in groups]
        buffer = self._taken.buffer(machine.host, (sum(sizes) + seated) * torch.int64.itemsize, "prompts")
        *rooms, self.newest = buffer.view(torch.int64).split([*sizes, seated])
        self.newest.zero_()
        self._ids = PromptIds(prompts, passes, pad_id, rooms, self.device.torch_device)
        made = self._ids.places if passes.rows else partial(self._ids.batch, began=0)
        self._batches = [made(rows, k) for k, rows in enumerate(groups)]
        self._cells = [CellRows(k, range(len(batch.rows)), batch) for k, batch in enumerate(self._batches)]
        self._slots = [
            torch.zeros(
                passes.positions(max(batches))
                if passes.rows
                else max([*sizes, max(batches) * passes.decoded]),
                dtype=torch.int64,
                device=self.device.torch_device,
            )
            for _ in range(0 if self.device.shares_host_memory else slots)
        ]
        self.made: dict[int, Tensor] = {}
        self.guesses: Guesses | None = None
        self.seating: Seating | None = None

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt."""
        return self._ids.lengths

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
        if not self._ids.entered:
            return Stage.FILL
        return Stage.STEADY if self.waiting else Stage.DRAIN

    @property
    def batches(self) -> list[list[int]]:
        """The rows in each batch."""
        return [list(batch.rows) for batch in self._batches]

    @property
    def by_place(self) -> bool:
        """Whether prompts enter in the places of single rows."""
        return self._passes.rows > 0

    @property
    def cells(self) -> list[tuple[int, range]]:
        """The batch of each cell of a layer, and the places in it whose rows the cell computes."""
        return [(k, places) for k, places, _ in self._cells]

    def batch(self, cell: int) -> Batch:
        """The batch, or the part of one, that a cell of a layer computes."""
        return self._cells[cell].batch

    @property
    def joint_cells(self) -> list[range]:
        """The cells of a layer that one call computes if no data moves between cells."""
        return joint_cells(self.tokens, self._passes.joint_tokens)

    @property
    def tokens(self) -> list[int]:
        """The number of tokens of each cell of a layer in a pass in which prompts enter by place."""
        return [own.ids[0].numel() if own.room is None else len(own.rows) for *_, own in self._cells]

    @property
    def first(self) -> int:
        """The number of the first pass."""
        return self._passes.first

    def cell(self, number: int, layer: int, batch: int, slot: int) -> BoundCell:
        """A cell of pass `number`, with its tokens: first the prompts or their parts, then one token per pass."""
        own = self.batch(batch)
        token, padding = number - own.first, own.padding
        if self.guesses is None or token < 1:
            span = self._span(number, own)
            return BoundCell(token, layer, batch, slot, span, padding, number, column=own.column)
        new = self.guesses.bind(own, token)
        return BoundCell(token, layer, batch, slot, new.span, padding, number, guesses=new)

    def _span(self, number: int, batch: Batch) -> Span:
        return self._passes.span(number - batch.first, batch.width)

    @property
    def shared(self) -> int:
        """The number of tokens before the prompts, which all rows share."""
        return self._passes.shared

    def passes_left(self, number: int, tokens: int) -> int:
        """The number of passes from `number` on until some row has all of its `tokens` new tokens.

        By place, the number until all rows have.
        """
        if self.by_place:
            new = self._new
            return tokens - min(new[row] for cell in self._cells for row in cell.batch.rows)
        return tokens - number + min(min(batch.origins) for batch in self._batches)

    @property
    def newest_begins(self) -> int:
        """The pass that computes the first new token of the prompts that have entered last."""
        return max(cell.batch.first for cell in self._cells)

    @property
    def _enters(self) -> bool:
        """Whether some cells compute a part of a batch, whose prompts enter."""
        return any(cell.batch.room is None for cell in self._cells)

    @property
    def _new(self) -> list[int]:
        """The number of new tokens of each row so far."""
        assert self.guesses is not None
        return [self.guesses.new(row) for row in range(len(self.lengths))]

    def reseated(self, ended: Sequence[bool]) -> list[list[int]] | None:
        """The row in each place of each batch for the next pass, [] if no row is left, and None if the cells stay the
        same. ended: whether a row has ended."""
        waiting = [row for rows in self.waiting for row in rows]
        rest = ended, self._new, waiting, self._passes.rows
        if self._passes.closes_up:
            seated = closed_up(self.batches, self._ids.sizes, *rest)
        else:
            seated = reseated(self.batches, *rest)
        if not any(seated):
            return []
        here = {cell.number for cell in self._cells}
        same = all(not rows if k not in here else rows == self.batches[k] for k, rows in enumerate(seated))
        return None if same and not self._enters else seated

    def seat(self, batches: Sequence[Sequence[int]], number: int) -> Reseated:
        """Continue from pass `number` with these rows in the places of each batch, [] for a batch that has ended.

        Returns the rows whose cached tokens must move.
        """
        assert self.guesses is not None
        passes, new, here = self._passes, self._new, list[CellRows]()
        moving = movers(self.batches, batches, new)
        for k, rows in enumerate(batches):
            if tuple(rows) != self._batches[k].rows:
                self._batches[k] = self._ids.places(rows, k)
            if count := sum(new[row] > 0 for row in rows):
                places, own = range(len(rows)), self._batches[k]
                if passes.closes_up and count < len(rows):  # the other rows enter, in the places after these
                    places, own = range(count), self._ids.places(rows[:count], k)
                here.append(CellRows(k, places, own))
                self.guesses.seat(own, number)
        seated = {row for rows in batches for row in rows}
        later = [rows for rows in self.waiting if rows[0] not in seated]
        self._ids.entered |= len(later) < len(self.waiting)
        self.waiting = later

        def together(rows: Sequence[int]) -> bool:
            return passes.together([self.lengths[row] for row in rows])

        cells = entry_cells(batches, new, passes.rows, together)
        parts = [CellRows(k, places, self._ids.part(self._batches[k], places, number)) for k, places in cells]
        self._cells = between(here, parts)
        longest = max((new[row] for row in moving), default=0)
        return Reseated(list(moving.values()), passes.width + longest)

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
        """The pass that computes the first new token of each row in the block after it has entered."""
        return {
            row: began for batch in self._batches for row, began in zip(batch.rows, batch.began, strict=True)
        }

    def origins(self) -> dict[int, int]:
        """See `Batch.origins`, for each row in the block."""
        return {row: at for batch in self._batches for row, at in zip(batch.rows, batch.origins, strict=True)}

    def put_back(self, rows: Sequence[int], number: int, ids: Tensor) -> None:
        """Let rows of the block wait again after pass `number`. They enter first, with their new `ids` (rows, tokens)
        so far as a part of their prompts."""
        began = self.began()
        for row in rows:
            self._ids.extend(row, ids[row].numpy(), max(number + 1 - began[row], 0))
        self.waiting.insert(0, sorted(rows, key=self._ids.kept.__getitem__))

    def regroup(self, batches: Sequence[Sequence[int]], number: int) -> list[Moved]:
        """Continue from pass `number` with only these rows in the block.

        A batch has rows of the block, or a batch of `waiting`, whose prompts enter. Returns the origin of the rows of
        each batch.
        """
        old = self._batches
        places = {row: (k, n) for k, batch in enumerate(old) for n, row in enumerate(batch.rows)}
        order = {row: n for n, row in enumerate(chain.from_iterable(batch.rows for batch in old))}
        columns = tuple(self._span(number, batch).length for batch in old)
        before = {batch.rows: k for k, batch in enumerate(old)}
        began, origins = self.began(), self.origins()
        made: list[Batch] = []
        used = {old[before[tuple(rows)]].room for rows in batches if tuple(rows) in before}
        rooms = [room for room in range(self.places) if room not in used]
        for rows in batches:
            if rows[0] not in began:
                self.waiting.remove(list(rows))
                self._ids.entered = True
                first = self._passes.first_of(max(self.lengths[row] for row in rows))
                made.append(self._ids.batch(rows, rooms.pop(0), max(number - first, 0)))
            elif tuple(rows) in before:
                made.append(old[before[tuple(rows)]])
            else:
                by_age = tuple(sorted(rows, key=origins.__getitem__))
                starts = [began[row] for row in by_age]
                if self.guesses is not None:  # each row has its own number of new tokens
                    starts = starts[-1:] * len(starts)
                own = tuple(starts), tuple(self.lengths[row] for row in by_age)
                kept = tuple(self._ids.kept[row] for row in by_age)
                made.append(Batch(by_age, *own, self.device.torch_device, kept=kept))
        self._batches = made
        self._cells = [CellRows(k, range(len(batch.rows)), batch) for k, batch in enumerate(made)]
        # A prompt that enters has no newest id yet, so any id will do.
        newest = [order.get(row, 0) for row in chain.from_iterable(batch.rows for batch in made)]
        self.newest[: len(newest)] = self.newest[newest]
        moves: list[Moved] = []
        for batch in made:
            if batch.rows[0] not in began:
                moves.append(Moved.entering(len(batch.rows), columns))
                continue
            whole, length, previous = before.get(batch.rows), self._span(number, batch).length, columns
            if self.guesses is not None and whole is None:
                length = self.guesses.move(batch, number - batch.first)
                previous = tuple(length + other.width - batch.width for other in old)
            moves.append(Moved(tuple(places[row] for row in batch.rows), previous, length, whole))
        return moves

    def close(self) -> None:
        self._taken.close()

    def source(self, cell: BoundCell) -> Tensor:
        """(rows, new) in host memory: ids of the prompt for the first token, later the newest id and guesses."""
        if cell.guesses is not None:
            return cell.guesses.computed
        if cell.token > 0:
            return self.newest[self.rows(cell.batch)].unsqueeze(1)
        return self.batch(cell.batch).ids[cell.token]

    def load(self, cell: BoundCell) -> Chains:
        """The work that loads the ids of the cell to the compute device."""
        source, rows = self.source(cell), len(self.batch(cell.batch).rows)
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

    def rows(self, cell: int) -> slice:
        """The rows that a cell of a layer computes, in `newest`."""
        number, places, _ = self._cells[cell]
        begin = sum(len(before.rows) for before in self._batches[:number])
        return slice(begin + places.start, begin + places.stop)

    def positions(self, cell: BoundCell) -> Tensor:
        """(rows, new) on the compute device, counted from the row's first token, which may be in a shared prefix.
        Padding has the position of the first token that is not."""
        span, device = cell.span, self.device.torch_device
        if cell.guesses is None:
            columns = torch.arange(span.length, span.length + span.new, device=device)
        else:  # a guess after the last token has its position: the model may have no other
            assert self.guesses is not None
            columns = cell.guesses.lengths.to(device)[:, None] + torch.arange(span.new, device=device)
            columns.clamp_(max=self.batch(cell.batch).width + self.guesses.tokens - 1)
        positions = (columns - cell.padding.on_device[:, None]).clamp_(min=0)
        return positions.add_(self._passes.shared) if self._passes.shared else positions

    def text_length(self, cell: BoundCell) -> Tensor | None:
        """See `Context`. It is the length of the prompt if the cell computes a part of the prompt."""
        if cell.token > 0 or self.first == 0:
            return None
        length = self._passes.shared + self._passes.cached + self.batch(cell.batch).width
        return torch.full((), length, device=self.device.torch_device)
