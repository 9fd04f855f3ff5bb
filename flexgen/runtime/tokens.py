"""The ids of one block: what the first layer reads, what the last one adds, and which rows have stopped."""

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
from flexgen.memory.device import ComputeDevice
from flexgen.memory.device_errors import lane_error, named
from flexgen.memory.machine import Machine
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind
from flexgen.runtime.choice import Choice, Listener, NewIds, Rows
from flexgen.runtime.compaction import Moved, regrouped
from flexgen.runtime.pages import Padding
from flexgen.runtime.sampler import INVALID


class Prompts:
    """Prompts of one block, those of each batch left-padded to one width, and the newest id of every row.

    `batches` count the rows of each GPU batch, in order. `self.batches` are the numbers of those rows in the block.
    `chunk`: the most tokens of a prompt that a pass computes; 0 for all. `cached`: tokens before those of `prompts`
    that the cache has of each row; prompts are of one length then. `first`: the number of the first pass.
    `positions_computed`: of all prompts, padding included. `made`: the ids (rows,) that the compute device has chosen
    last for each batch; the host may not have them yet.
    """

    batches: Sequence[Sequence[int]]
    padding: list[Padding]

    @whole_or_closed
    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        batches: Sequence[int],
        pad_id: int,
        machine: Machine,
        slots: int = SLOTS,
        chunk: int = 0,
        cached: int = 0,
    ) -> None:
        self._taken = Taken()
        self._device = device = machine.device
        self.lengths = [len(prompt) for prompt in prompts]
        self._passes = Passes(max(self.lengths), chunk, cached)
        self.first = self._passes.first
        self._group([list(range(a, b)) for a, b in pairwise(accumulate(batches, initial=0))])
        sizes = [rows * width for rows, width in zip(batches, self._widths, strict=True)]
        self.positions_computed = sum(sizes)
        item = torch.int64.itemsize
        buffer = self._taken.buffer(machine.host, (sum(sizes) + len(prompts)) * item, "prompts")
        *flat, self.newest = buffer.view(torch.int64).split([*sizes, len(prompts)])
        self.newest.zero_()
        self._ids: dict[tuple[int, int], Tensor] = {}  # by pass and batch
        for k, (rows, width, into) in enumerate(zip(self.batches, self._widths, flat, strict=True)):
            ids = torch.full((len(rows), width), pad_id)
            for row, n in zip(ids, rows, strict=True):
                row[width - len(prompts[n]) :] = torch.from_numpy(prompts[n])
            for token in range(self.first, 1):
                span = self.span(token, k)
                begin, new = span.length - cached, span.new
                part = into[len(rows) * begin : len(rows) * (begin + new)].view(len(rows), new)
                self._ids[token, k] = part.copy_(ids[:, begin : begin + new])
        most = max(ids.numel() for ids in self._ids.values())
        self._slots = [
            torch.zeros(most, dtype=torch.int64, device=device.torch_device)
            for _ in range(0 if device.shares_host_memory else slots)
        ]
        self.made: dict[int, Tensor] = {}

    def _group(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches
        self._rows = [slice(a, b) for a, b in pairwise(accumulate(map(len, batches), initial=0))]
        self._widths = [max(self.lengths[row] for row in rows) for rows in batches]
        self.padding = [
            self._padding(tuple(width - self.lengths[row] for row in rows))
            for rows, width in zip(batches, self._widths, strict=True)
        ]

    def regroup(self, batches: Sequence[Sequence[int]], token: int) -> list[Moved]:
        """From `token` (not the first) on, only these rows of the block, which must be among those before.

        A batch is padded to the longest of its own prompts. Returns where the rows of each batch come from.
        """
        places = {row: (k, n) for k, rows in enumerate(self.batches) for n, row in enumerate(rows)}
        order = {row: n for n, row in enumerate(chain.from_iterable(self.batches))}
        lengths = tuple(self.span(token, k).length for k in range(len(self.batches)))
        before = {tuple(rows): k for k, rows in enumerate(self.batches)}
        self._group(batches)
        newest = [order[row] for row in chain.from_iterable(batches)]
        self.newest[: len(newest)] = self.newest[newest]
        return [
            Moved(
                tuple(places[row] for row in rows),
                lengths,
                self.span(token, k).length,
                before.get(tuple(rows)),
            )
            for k, rows in enumerate(batches)
        ]

    def span(self, token: int, batch: int) -> Span:
        """The columns of the step: the prompts or their parts first, then one at a time."""
        return self._passes.span(token, self._widths[batch])

    def _padding(self, starts: tuple[int, ...]) -> Padding:
        there = torch.tensor(starts, dtype=torch.int64)
        return Padding(starts, there.to(self._device.torch_device), there)

    def close(self) -> None:
        self._taken.close()

    def source(self, token: int, batch: int) -> Tensor:
        """(rows, seq) in host memory: of the prompt up to the first token, then the newest id."""
        rows = self._rows[batch]
        return self.newest[rows].unsqueeze(1) if token > 0 else self._ids[token, batch]

    def load(self, token: int, batch: int, slot: int) -> Chains:
        """The work that brings the ids of the step to the compute device."""
        source, layout = self.source(token, batch), IdLayout(len(self.batches[batch]), self._device.topology)
        routes = layout.load(source.shape[1])
        if not routes:
            return ()
        target = self._slots[slot][: source.numel()].view(source.shape)
        return bind(routes, lambda _, move: partial(self._device.to_device, target, source))

    def take(self, token: int, batch: int, slot: int) -> Tensor:
        """(rows, seq) on the compute device, once `load` is done."""
        source = self.source(token, batch)
        if self._device.shares_host_memory:
            return source
        return self._slots[slot][: source.numel()].view(source.shape)

    def fed(self, batch: int) -> Tensor:
        """(rows, 1) on the compute device: the ids of the next token, from `made`, not from the host.

        A row that has ended continues with the id that was chosen for it, and one without a valid id with id 0. The
        host uses nothing that follows.
        """
        return self.made[batch].clamp_min(0).unsqueeze(1)

    def rows(self, batch: int) -> slice:
        """Where the rows of `batch` are in `newest`."""
        return self._rows[batch]

    def positions(self, token: int, batch: int) -> Tensor:
        """(rows, seq) on the compute device: counted from the row's first token, 0 in the padding."""
        span = self.span(token, batch)
        columns = torch.arange(span.length, span.length + span.new, device=self._device.torch_device)
        return (columns - self.padding[batch].on_device[:, None]).clamp_(min=0)

    def text_length(self, token: int, batch: int) -> Tensor | None:
        """As of `Context`: that of the prompt where the step computes a part of it."""
        if token > 0 or self.first == 0:
            return None
        length = self._passes.cached + self._widths[batch]
        return torch.full((), length, device=self._device.torch_device)


class Output(Protocol):
    """What becomes of the last layer's logits, and of the hidden states before it."""

    last_only: bool
    """Whether only the last position's logits are wanted."""

    by_token: bool
    """Whether each token is a run of its own: its ids are chosen by `following`, while the lanes are idle."""

    can_finish: bool

    def keep(self, token: int, batch: int, slot: int, logits: Tensor) -> None:
        """Accept logits (rows, seq or 1, vocab) on the compute device; part of the computation."""

    def store(self, token: int, batch: int, slot: int) -> Chains:
        """The work that brings what was made of them to host memory."""

    def wants_hidden(self, layer: int) -> bool:
        """Whether what this layer computes is kept; of the last one, what its matrix multiplies."""

    def keep_hidden(self, layer: int, slot: int, hidden: Tensor) -> None:
        """Accept hidden states (rows, seq, hidden) that are wanted, on the compute device. Not to be written to."""

    def store_hidden(self, layer: int, batch: int, slot: int) -> Chains:
        """The work that brings them to host memory."""

    def following(self, token: int) -> list[list[int]] | None:
        """The rows of each batch after `token`: [] if every row has stopped, None to go on as before."""


class NewTokens:
    """Has the next id of every row chosen, and keeps them until the row ends.

    `ids` (rows of the block, tokens): pad id after a row has ended. `count`: tokens made before that.
    `names` are the caller's numbers of the block's rows, by which `choice` and `listeners` know them.
    """

    last_only = True
    by_token = False

    def __init__(
        self,
        prompts: Prompts,
        tokens: int,
        choice: Choice,
        pad_id: int,
        device: ComputeDevice,
        names: Rows | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._prompts = prompts
        self._choice = choice
        self._listeners = listeners
        self.count = 0
        self._pad_id = pad_id
        self._device = device
        count = len(prompts.lengths)
        self._names = range(count) if names is None else names
        self.ids = torch.full((count, tokens), pad_id, dtype=torch.int64)
        self._ended = torch.zeros(count, dtype=torch.bool)
        self.can_finish = choice.can_end

    def keep(self, token: int, batch: int, slot: int, logits: Tensor) -> None:
        self._prompts.made[batch] = self._choice.choose(logits[:, -1], self._named(batch), token)

    def store(self, token: int, batch: int, slot: int) -> Chains:
        layout = IdLayout(len(self._prompts.batches[batch]), self._device.topology)
        fetch, record = partial(self._fetch, batch), partial(self._record, token, batch)
        return bind(layout.store(), lambda _, move: record if move.kind is Kind.RECORD else fetch)

    def wants_hidden(self, layer: int) -> bool:
        return False

    def keep_hidden(self, layer: int, slot: int, hidden: Tensor) -> None:
        raise AssertionError("not wanted")

    def store_hidden(self, layer: int, batch: int, slot: int) -> Chains:
        return ()

    def _named(self, batch: int) -> Rows:
        return [self._names[row] for row in self._prompts.batches[batch]]

    def _fetch(self, batch: int) -> None:
        self._device.from_device(self._prompts.newest[self._prompts.rows(batch)], self._prompts.made[batch])

    def _record(self, token: int, batch: int) -> None:
        newest = self._prompts.newest[self._prompts.rows(batch)]
        if self._device.shares_host_memory:
            newest.copy_(self._prompts.made[batch])
        self._accept(token, self._prompts.batches[batch], newest)

    def _accept(self, token: int, rows: Rows, ids: Tensor) -> None:
        """Keep what was chosen for these rows of the block; those that had ended before get the pad id in `ids`."""
        names = [self._names[row] for row in rows]
        before = self._ended[rows]
        ids.masked_fill_(before, self._pad_id)
        if (ids == INVALID).any():
            row = names[ids.tolist().index(INVALID)]
            raise LaneError(
                f"row {row} has logits that are NaN or infinite at new token {token}, so no id can be chosen. "
                "Weights that are NaN or infinite cause this, and so do values beyond float16: check the checkpoint, "
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
    """`NewTokens` of a call that is one block, by a choice that sees the whole call."""

    by_token = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._logits: dict[int, Tensor] = {}  # (rows, vocab) of each batch
        self._rows = sorted(range(len(self._names)), key=self._names.__getitem__)

    def keep(self, token: int, batch: int, slot: int, logits: Tensor) -> None:
        self._logits[batch] = logits[:, -1]

    def store(self, token: int, batch: int, slot: int) -> Chains:
        return ()

    def following(self, token: int) -> list[list[int]]:
        """Chooses the ids of `token`, which the next run reads. Raises LaneError, with what a choice or a listener
        has raised as its cause."""
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
    """What `WholeCallTokens` and a choice take to choose for all rows at once: logits as the batches leave them, in
    one tensor, in float32, and as processed; and what drawing takes."""
    each = 2 * dtype.itemsize + 2 * torch.float32.itemsize
    nbytes = rows * vocab * each + choice_bytes(rows, vocab)
    return [Need(topology.device, "logits", "workspace", nbytes)]
