"""The ids of the prompts of a block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexgen.layout.passes import Passes
from flexgen.runtime.batches import Batch


class PromptIds:
    """The ids of prompts, and host memory (`rooms`) for those of the batches that are computed next.

    `lengths`: of the prompts, with the new tokens that were `kept` of rows that were put back to wait. `entered`:
    whether some have entered after the first block of prompts.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        passes: Passes,
        pad_id: int,
        rooms: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._prompts = list(prompts)
        self.lengths = [len(prompt) for prompt in prompts]
        self.kept = [0] * len(prompts)
        self._passes = passes
        self.pad_id = pad_id
        self.rooms = rooms
        self.entered = False
        self._device = device

    @property
    def sizes(self) -> list[int]:
        """The number of places of each batch in which prompts enter by `part`."""
        return [len(room) // self._passes.width for room in self.rooms]

    def batch(self, rows: Sequence[int], room: int, began: int) -> Batch:
        """A batch of prompts that are computed next, with padded ids in memory number `room`."""
        lengths = tuple(len(self._prompts[row]) for row in rows)
        width = max(lengths)
        ids = torch.full((len(rows), width), self.pad_id)
        for row, n in zip(ids, rows, strict=True):
            row[width - len(self._prompts[n]) :] = torch.from_numpy(self._prompts[n])
        parts, into = {}, self.rooms[room]
        for token in range(min(self._passes.first, self._passes.first_of(width)), 1):
            span = self._passes.span(token, width)
            begin, new = span.length - self._passes.cached, span.new
            part = into[len(rows) * begin : len(rows) * (begin + new)].view(len(rows), new)
            parts[token] = part.copy_(ids[:, begin : begin + new])
        kept = tuple(self.kept[row] for row in rows)
        return Batch(tuple(rows), (began,) * len(rows), lengths, self._device, parts, room, kept=kept)

    def extend(self, row: int, ids: np.ndarray, new: int) -> None:
        """Add the next `new` of the new `ids` of a row to its prompt."""
        kept = self.kept[row]
        self.kept[row] = kept + new
        self._prompts[row] = np.concatenate([self._prompts[row], ids[kept : kept + new]])
        self.lengths[row] += new

    def places(self, rows: Sequence[int], room: int) -> Batch:
        """A batch in whose places prompts enter. All of them end in the same column, and began in pass 0."""
        lengths, width = tuple(len(self._prompts[row]) for row in rows), self._passes.width
        return Batch(tuple(rows), (0,) * len(rows), lengths, self._device, {}, room, width)

    def part(self, batch: Batch, places: range, number: int) -> Batch:
        """The prompts in some places of a batch, which pass `number` computes."""
        assert batch.room is not None
        some = slice(places.start, places.stop)
        rows, lengths = batch.rows[some], batch.lengths[some]
        width, count = max(lengths), len(rows)
        begin = places.start * batch.width
        ids = self.rooms[batch.room][begin : begin + count * width].view(count, width).fill_(self.pad_id)
        for own, row in zip(ids, rows, strict=True):
            own[width - len(self._prompts[row]) :] = torch.from_numpy(self._prompts[row])
        began, column = (number,) * count, batch.width - width
        return Batch(rows, began, lengths, self._device, {0: ids}, column=column)
