"""The new ids of one block, and the rows that have stopped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import LaneError
from flexgen.kernels.workspaces import choice_bytes
from flexgen.layout.hidden import IdLayout
from flexgen.layout.moves import Kind
from flexgen.layout.needs import Need
from flexgen.layout.topology import Topology
from flexgen.memory.device_errors import lane_error, named
from flexgen.memory.transfer import Chains, bind
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.choice import Choice, Listener, NewIds, Rows, Tokens
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.sampler import INVALID
from flexgen.schedule.admission import gathered, regrouped


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

    def following(self, number: int) -> list[list[int]] | None:
        """The rows of each batch after pass `number`: [] if every row has stopped, None to continue without a
        change."""


class NewTokens:
    """Chooses the next id of every row with `choice`, and stores the ids until the row ends.

    `ids` (prompts, tokens): contains the pad id of `prompts` after the end of a row. `count`: the number of
    tokens before that. names: the caller's numbers of the prompts, which `choice` and `listeners` receive.
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
        # Arrays of NumPy, not tensors: in each pass, weights replace the code of operations in the caches of a CPU,
        # and NumPy's operations have less code than torch's.
        self._stored = self.ids.numpy()
        self._ended = np.zeros(count, dtype=bool)
        self._guesses = prompts.guesses
        self.can_finish = choice.can_end or self._guesses is not None or prompts.seating is not None

    def keep(self, cell: BoundCell, logits: Tensor) -> None:
        if cell.guesses is not None:
            self._prompts.made[cell.batch] = self._chosen(cell.batch, cell.guesses.first, logits)
            return
        batch, logits = self._prompts.batch(cell.batch), logits[:, -1]
        chosen = [
            self._choice.choose(logits[some], self._named(batch.rows[some]), cell.token - behind)
            for some, behind in batch.runs
        ]
        self._prompts.made[cell.batch] = chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _chosen(self, batch: int, first: Sequence[int], logits: Tensor) -> Tensor:
        """The ids (rows, new) for logits (rows, new, vocab), chosen as if each one before were right. `first`: the
        number of the first token of each row."""
        rows = self._prompts.batch(batch).rows
        names, made = self._named(rows), list[Tensor]()
        for n in range(logits.shape[1]):
            tokens = [begin + n for begin in first]
            same = len(set(tokens)) == 1
            made.append(self._choice.choose(logits[:, n], names, tokens[0] if same else tokens))
        return torch.stack(made, dim=1)

    def store(self, cell: BoundCell) -> Chains:
        layout = IdLayout(len(self._prompts.batch(cell.batch).rows), self._prompts.device.topology)
        if cell.guesses is not None:
            drawn = cell.guesses.drawn
            fetch = partial(self._fetch_to, drawn, cell.batch)
            record = partial(self._record_guesses, cell.token, cell.batch, drawn)
        else:
            newest = self._prompts.newest[self._prompts.rows(cell.batch)]
            fetch = partial(self._fetch_to, newest, cell.batch)
            record = partial(self._record, cell.token, cell.batch)
        new = cell.span.new if cell.guesses is not None else 1  # the head computes one position of a prompt
        return bind(layout.store(new), lambda _, move: record if move.kind is Kind.RECORD else fetch)

    def wants_hidden(self, layer: int) -> bool:
        return False

    def keep_hidden(self, cell: BoundCell, hidden: Tensor) -> None:
        raise AssertionError("not wanted")

    def store_hidden(self, cell: BoundCell) -> Chains:
        return ()

    def _named(self, rows: Rows) -> Rows:
        return [self._names[row] for row in rows]

    def _fetch_to(self, target: Tensor, batch: int) -> None:
        self._prompts.device.from_device(target, self._prompts.made[batch])

    def _record(self, token: int, batch: int) -> None:
        newest = self._prompts.newest[self._prompts.rows(batch)]
        if self._prompts.device.shares_host_memory:
            newest.copy_(self._prompts.made[batch])
        own = self._prompts.batch(batch)
        for some, behind in own.runs:
            self._accept(token - behind, list(own.rows[some]), newest[some])
        if self._guesses is not None:
            self._guesses.start(own, newest.tolist(), self._rows_ended())

    def _record_guesses(self, token: int, batch: int, drawn: Tensor) -> None:
        """Accept the ids chosen in pass `token` that follow the newest id of each row or guesses that are kept."""
        assert self._guesses is not None
        if self._prompts.device.shares_host_memory:
            drawn.copy_(self._prompts.made[batch])
        own = self._prompts.batch(batch)
        first, got = self._guesses.accepted(own, token, drawn.tolist())
        kept: list[list[int]] = [[] for _ in own.rows]
        # Position after position, so that a row that ends gets no more.
        for n in range(drawn.shape[1]):
            ended = self._ended[list(own.rows)]
            # A row without a first new token is a prompt that is not computed yet.
            live = [row for row, ids in enumerate(got) if n < len(ids) and first[row] and not ended[row]]
            if live:
                ids = torch.tensor([got[row][n] for row in live])
                self._accept([first[row] + n for row in live], [own.rows[row] for row in live], ids)
                for row in live:
                    kept[row].append(got[row][n])
        self._guesses.advance(own, token, kept, self._rows_ended())

    def _rows_ended(self) -> set[int]:
        return set(np.flatnonzero(self._ended).tolist())

    def _accept(self, token: Tokens, rows: Rows, ids: Tensor) -> None:
        """Store the ids chosen for these rows as `token`. In `ids`, rows that ended before get the pad id."""
        names, own, made = self._named(rows), list(rows), ids.numpy()
        tokens = np.full(len(own), token)
        before = self._ended[own]
        made[before] = self._prompts.pad_id
        if INVALID in made:
            place = made.tolist().index(INVALID)
            raise LaneError(
                f"row {names[place]} has logits that are NaN or infinite at new token {tokens[place]}, so no id can "
                "be chosen. NaN or infinite weights, or values beyond the range of float16, cause this: check the "
                'checkpoint, or open the model with dtype="bfloat16" or "float32"'
            )
        self._stored[own, tokens] = made
        self.count += len(own) - int(np.count_nonzero(before))
        ended = before | (tokens == self._stored.shape[1] - 1)
        if self._choice.can_end:
            ended |= np.asarray(self._choice.ends(ids, names, token), dtype=bool)
        self._ended[own] = ended
        if not self._listeners:
            return
        for number in np.unique(tokens).tolist():
            some = np.flatnonzero(tokens == number)
            live = ~before[some]
            parts = (torch.from_numpy(part) for part in (made[some], live, live & ended[some]))
            new = NewIds([names[n] for n in some.tolist()], number, *parts)
            for listener in self._listeners:
                listener(new)

    def following(self, number: int) -> list[list[int]] | None:
        tokens, ended, waiting = self.ids.shape[1], self._ended.tolist(), self._prompts.waiting
        if self._prompts.by_place:
            return self._prompts.reseated(ended)
        origins, entering = self._prompts.origins(), self._prompts.entering(number + 1)
        made = self._guesses.new if self._guesses else lambda row: number + 1 - origins[row]
        left = max((tokens - made(row) for row in origins if not ended[row]), default=0)
        kept: list[list[int]] | None
        # Rows that began together end together at the latest. The next prompts start in column 0.
        if self._guesses is None and self._prompts.passes_left(number + 1, tokens) < 1:
            kept = gathered(self._prompts.batches, ended, entering)
        else:
            kept = regrouped(self._prompts.batches, ended, left, entering, bool(waiting))
        if seating := self._prompts.seating:
            stay = self._prompts.batches if kept is None else kept
            following = seating.following(self._prompts, stay, number, self.ids, ended)
            return None if kept is None and following == stay else following
        if kept is None:
            return None
        return [*kept, *waiting[: self._prompts.places - len(kept)]]


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

    def following(self, number: int) -> list[list[int]]:
        """Choose the ids of token `number`, which the next run reads.

        Raises LaneError, whose cause is the error of the choice or of a listener.
        """
        rows = self._rows
        try:
            ids = self._choice.choose(self._together(), range(len(rows)), number).cpu()
            self._accept(number, rows, ids)
        except LaneError:
            raise
        except Exception as error:
            cause = named(error)
            raise lane_error(f"choosing token {number} of all {len(rows)} rows failed", cause) from cause
        self._prompts.newest[rows] = ids
        return [] if self._ended.all() else self._prompts.batches

    def _together(self) -> Tensor:
        """The logits of all rows, in the order of the call."""
        some = next(iter(self._logits.values()))
        logits = some.new_empty(len(self._rows), some.shape[1])
        for batch in range(len(self._prompts.batches)):
            logits[self._named(self._prompts.batch(batch).rows)] = self._logits.pop(batch)
        return logits


def whole_call_needs(rows: int, vocab: int, dtype: torch.dtype, topology: Topology) -> list[Need]:
    """The needs of `WholeCallTokens` and its choice for all rows together.

    They consist of the logits of the batches, in one tensor, in float32 and after processing, and of the memory to
    draw ids.
    """
    each = 2 * dtype.itemsize + 2 * torch.float32.itemsize
    nbytes = rows * vocab * each + choice_bytes(rows, vocab)
    return [Need(topology.device, "logits", "workspace", nbytes)]
