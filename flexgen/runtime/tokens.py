"""The ids of one block: the inputs of the first layer, the new ids, and the rows that have stopped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import LaneError
from flexgen.kernels.workspaces import choice_bytes
from flexgen.layout.cache import Span
from flexgen.layout.hidden import IdLayout
from flexgen.layout.moves import Kind
from flexgen.layout.needs import Need
from flexgen.layout.passes import Passes
from flexgen.layout.plan import SLOTS
from flexgen.layout.topology import Topology
from flexgen.memory.device_errors import lane_error, named
from flexgen.memory.machine import Machine
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.choice import Choice, Listener, NewIds, Rows
from flexgen.runtime.compaction import Moved, regrouped
from flexgen.runtime.sampler import INVALID


class _Grouping:
    """The rows of each GPU batch of a block, and the padding of their prompts.

    `batches`: the numbers of the rows. `places`: the rows of each batch in `Prompts.newest`. `widths`: the length of
    the longest prompt of each batch.
    """

    def __init__(
        self, batches: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device
    ) -> None:
        self.batches = batches
        self.places = [slice(a, b) for a, b in pairwise(accumulate(map(len, batches), initial=0))]
        self.widths = [max(lengths[row] for row in rows) for rows in batches]
        self.padding = []
        for rows, width in zip(batches, self.widths, strict=True):
            starts = tuple(width - lengths[row] for row in rows)
            there = torch.tensor(starts, dtype=torch.int64)
            self.padding.append(Padding(starts, there.to(device), there))


class Prompts:
    """The prompts of one block, left-padded to one width per batch, and the newest id of every row.

    batches: the number of rows of each GPU batch, in order. `self.batches` are the numbers of these rows in the
    block. passes: the passes for the block's longest prompt. If the cache has tokens before `prompts`, all prompts
    must have the same length. `positions_computed`: the positions of all prompts, including padding. `made`: the
    newest ids (rows,) that the compute device has chosen for each batch, which the host may not have yet.
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
        self.pad_id = pad_id
        self.lengths = [len(prompt) for prompt in prompts]
        self._passes = passes
        self._group([list(range(a, b)) for a, b in pairwise(accumulate(batches, initial=0))])
        widths = self._grouping.widths
        sizes = [rows * width for rows, width in zip(batches, widths, strict=True)]
        self.positions_computed = sum(sizes)
        item = torch.int64.itemsize
        buffer = self._taken.buffer(machine.host, (sum(sizes) + len(prompts)) * item, "prompts")
        *flat, self.newest = buffer.view(torch.int64).split([*sizes, len(prompts)])
        self.newest.zero_()
        self._ids: dict[tuple[int, int], Tensor] = {}  # by (pass, batch)
        for k, (rows, width, into) in enumerate(zip(self.batches, widths, flat, strict=True)):
            ids = torch.full((len(rows), width), pad_id)
            for row, n in zip(ids, rows, strict=True):
                row[width - len(prompts[n]) :] = torch.from_numpy(prompts[n])
            for token in range(self.first, 1):
                span = self._span(token, k)
                begin, new = span.length - passes.cached, span.new
                part = into[len(rows) * begin : len(rows) * (begin + new)].view(len(rows), new)
                self._ids[token, k] = part.copy_(ids[:, begin : begin + new])
        most = max(ids.numel() for ids in self._ids.values())
        self._slots = [
            torch.zeros(most, dtype=torch.int64, device=self.device.torch_device)
            for _ in range(0 if self.device.shares_host_memory else slots)
        ]
        self.made: dict[int, Tensor] = {}

    def _group(self, batches: Sequence[Sequence[int]]) -> None:
        self._grouping = _Grouping(batches, self.lengths, self.device.torch_device)

    @property
    def batches(self) -> Sequence[Sequence[int]]:
        """The rows of the block in each batch."""
        return self._grouping.batches

    @property
    def first(self) -> int:
        """The number of the first pass."""
        return self._passes.first

    def cell(self, token: int, layer: int, batch: int, slot: int) -> BoundCell:
        """A cell of the pass that computes `token`, with its tokens: first the prompts or their parts, then one token
        per pass."""
        span, padding = self._span(token, batch), self._grouping.padding[batch]
        return BoundCell(token, layer, batch, slot, span, padding)

    @property
    def shared(self) -> int:
        """The number of tokens before the prompts, which all rows share."""
        return self._passes.shared

    def _span(self, token: int, batch: int) -> Span:
        return self._passes.span(token, self._grouping.widths[batch])

    def regroup(self, batches: Sequence[Sequence[int]], token: int) -> list[Moved]:
        """Continue from `token` (not the first one) with only these rows of the block, a subset of the previous ones.

        A batch is padded to the longest of its own prompts. Returns the origin of the rows of each batch.
        """
        places = {row: (k, n) for k, rows in enumerate(self.batches) for n, row in enumerate(rows)}
        order = {row: n for n, row in enumerate(chain.from_iterable(self.batches))}
        lengths = tuple(self._span(token, k).length for k in range(len(self.batches)))
        before = {tuple(rows): k for k, rows in enumerate(self.batches)}
        self._group(batches)
        newest = [order[row] for row in chain.from_iterable(batches)]
        self.newest[: len(newest)] = self.newest[newest]
        return [
            Moved(
                tuple(places[row] for row in rows),
                lengths,
                self._span(token, k).length,
                before.get(tuple(rows)),
            )
            for k, rows in enumerate(batches)
        ]

    def close(self) -> None:
        self._taken.close()

    def source(self, cell: BoundCell) -> Tensor:
        """(rows, new) in host memory: ids of the prompt for the first token, later the newest id."""
        if cell.token > 0:
            return self.newest[self.rows(cell.batch)].unsqueeze(1)
        return self._ids[cell.token, cell.batch]

    def load(self, cell: BoundCell) -> Chains:
        """The work that loads the ids of the cell to the compute device."""
        source, layout = self.source(cell), IdLayout(len(self.batches[cell.batch]), self.device.topology)
        routes = layout.load(cell.span.new)
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
        return self._grouping.places[batch]

    def positions(self, cell: BoundCell) -> Tensor:
        """(rows, new) on the compute device, counted from the row's first token, which may be in a shared prefix.
        Padding has the position of the first token that is not."""
        span = cell.span
        columns = torch.arange(span.length, span.length + span.new, device=self.device.torch_device)
        positions = (columns - cell.padding.on_device[:, None]).clamp_(min=0)
        return positions.add_(self._passes.shared) if self._passes.shared else positions

    def text_length(self, cell: BoundCell) -> Tensor | None:
        """See `Context`. It is the length of the prompt if the cell computes a part of the prompt."""
        if cell.token > 0 or self.first == 0:
            return None
        length = self._passes.shared + self._passes.cached + self._grouping.widths[cell.batch]
        return torch.full((), length, device=self.device.torch_device)


class Output(Protocol):
    """Receives the last layer's logits, and hidden states of earlier layers."""

    last_only: bool
    """Whether only the logits of the last position are needed."""

    by_token: bool
    """Whether each token is a separate run, whose ids `following` chooses while the lanes are idle."""

    can_finish: bool

    def keep(self, cell: BoundCell, logits: Tensor) -> None:
        """Accept logits (rows, seq or 1, vocab) on the compute device. Part of the computation."""

    def store(self, cell: BoundCell) -> Chains:
        """The work that moves the result to host memory."""

    def wants_hidden(self, layer: int) -> bool:
        """Whether this layer's result is kept. For the last layer, these are the hidden states that its matrix
        multiplies."""

    def keep_hidden(self, cell: BoundCell, hidden: Tensor) -> None:
        """Accept kept hidden states (rows, seq, hidden) on the compute device. The method must not write to them."""

    def store_hidden(self, cell: BoundCell) -> Chains:
        """The work that moves the hidden states to host memory."""

    def following(self, token: int) -> list[list[int]] | None:
        """The rows of each batch after `token`: [] if every row has stopped, None to continue without a change."""


class NewTokens:
    """Chooses the next id of every row with `choice`, and stores the ids until the row ends.

    `ids` (rows of the block, tokens): contains the pad id of `prompts` after the end of a row. `count`: the number of
    tokens before that. names: the caller's numbers of the block's rows, which `choice` and `listeners` receive.
    """

    last_only = True
    by_token = False

    def __init__(
        self,
        prompts: Prompts,
        tokens: int,
        choice: Choice,
        names: Rows | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._prompts = prompts
        self._choice = choice
        self._listeners = listeners
        self.count = 0
        count = len(prompts.lengths)
        self._names = range(count) if names is None else names
        self.ids = torch.full((count, tokens), prompts.pad_id, dtype=torch.int64)
        self._ended = torch.zeros(count, dtype=torch.bool)
        self.can_finish = choice.can_end

    def keep(self, cell: BoundCell, logits: Tensor) -> None:
        self._prompts.made[cell.batch] = self._choice.choose(
            logits[:, -1], self._named(cell.batch), cell.token
        )

    def store(self, cell: BoundCell) -> Chains:
        layout = IdLayout(len(self._prompts.batches[cell.batch]), self._prompts.device.topology)
        fetch, record = partial(self._fetch, cell.batch), partial(self._record, cell.token, cell.batch)
        return bind(layout.store(), lambda _, move: record if move.kind is Kind.RECORD else fetch)

    def wants_hidden(self, layer: int) -> bool:
        return False

    def keep_hidden(self, cell: BoundCell, hidden: Tensor) -> None:
        raise AssertionError("not wanted")

    def store_hidden(self, cell: BoundCell) -> Chains:
        return ()

    def _named(self, batch: int) -> Rows:
        return [self._names[row] for row in self._prompts.batches[batch]]

    def _fetch(self, batch: int) -> None:
        self._prompts.device.from_device(
            self._prompts.newest[self._prompts.rows(batch)], self._prompts.made[batch]
        )

    def _record(self, token: int, batch: int) -> None:
        newest = self._prompts.newest[self._prompts.rows(batch)]
        if self._prompts.device.shares_host_memory:
            newest.copy_(self._prompts.made[batch])
        self._accept(token, self._prompts.batches[batch], newest)

    def _accept(self, token: int, rows: Rows, ids: Tensor) -> None:
        """Store the ids chosen for these rows of the block. In `ids`, rows that ended before get the pad id."""
        names = [self._names[row] for row in rows]
        before = self._ended[rows]
        ids.masked_fill_(before, self._prompts.pad_id)
        if (ids == INVALID).any():
            row = names[ids.tolist().index(INVALID)]
            raise LaneError(
                f"row {row} has logits that are NaN or infinite at new token {token}, so no id can be chosen. "
                "NaN or infinite weights, or values beyond the range of float16, cause this: check the checkpoint, "
                'or open the model with dtype="bfloat16" or "float32"'
            )
        self.ids[rows, token] = ids
        self.count += len(ids) - int(before.sum())
        ended = before
        if self.can_finish:
            ended = before | self._choice.ends(ids, names, token)
            self._ended[rows] = ended
        if self._listeners:
            live = ~before
            last = live if token == self.ids.shape[1] - 1 else live & ended
            for listener in self._listeners:
                listener(NewIds(names, token, ids, live, last))

    def following(self, token: int) -> list[list[int]] | None:
        return regrouped(self._prompts.batches, self._ended.tolist(), self.ids.shape[1] - token - 1)


class WholeCallTokens(NewTokens):
    """`NewTokens` for a call that is one block, with a choice that is made for the whole call."""

    by_token = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._logits: dict[int, Tensor] = {}  # (rows, vocab) of each batch
        self._rows = sorted(range(len(self._names)), key=self._names.__getitem__)

    def keep(self, cell: BoundCell, logits: Tensor) -> None:
        self._logits[cell.batch] = logits[:, -1]

    def store(self, cell: BoundCell) -> Chains:
        return ()

    def following(self, token: int) -> list[list[int]]:
        """Choose the ids of `token`, which the next run reads.

        Raises LaneError, whose cause is the error of the choice or of a listener.
        """
        rows = self._rows
        try:
            ids = self._choice.choose(self._together(), range(len(rows)), token).cpu()
            self._accept(token, rows, ids)
        except LaneError:
            raise
        except Exception as error:
            cause = named(error)
            raise lane_error(f"choosing token {token} of all {len(rows)} rows failed", cause) from cause
        self._prompts.newest[rows] = ids
        last = token == self.ids.shape[1] - 1
        return [] if last or self._ended.all() else list(map(list, self._prompts.batches))

    def _together(self) -> Tensor:
        """The logits of all rows, in the order of the call."""
        some = next(iter(self._logits.values()))
        logits = some.new_empty(len(self._rows), some.shape[1])
        for batch in range(len(self._prompts.batches)):
            logits[self._named(batch)] = self._logits.pop(batch)
        return logits


def whole_call_needs(rows: int, vocab: int, dtype: torch.dtype, topology: Topology) -> list[Need]:
    """The needs of `WholeCallTokens` and its choice for all rows together.

    They consist of the logits of the batches, in one tensor, in float32 and after processing, and of the memory to
    draw ids.
    """
    each = 2 * dtype.itemsize + 2 * torch.float32.itemsize
    nbytes = rows * vocab * each + choice_bytes(rows, vocab)
    return [Need(topology.device, "logits", "workspace", nbytes)]
