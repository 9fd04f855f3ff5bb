"""Texts of rows while they are generated: decoded as ids arrive, up to a stop string of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen.engine.text import Decoder
from flexgen.runtime.choice import Choice, NewIds, Rows, Tokens


class EndedRows:
    """A listener that passes (row, its new ids) on when a row has ended."""

    def __init__(self, emit: Callable[[tuple[int, np.ndarray]], object]) -> None:
        self._emit = emit
        self._ids: dict[int, list[int]] = {}

    def __call__(self, new: NewIds) -> None:
        columns = new.rows, new.ids.tolist(), new.live.tolist(), new.ended.tolist()
        for row, id, live, ended in zip(*columns, strict=True):
            if live:
                self._ids.setdefault(row, []).append(id)
            if ended:
                self._emit((row, np.array(self._ids.pop(row), dtype=np.int64)))


class DecodedTexts:
    """A choice that decodes each row as its ids arrive, passes the pieces on, and ends a row at a stop string.

    stops: the stop strings of each prompt.
    """

    can_end = True
    whole_call = False

    def __init__(
        self,
        choice: Choice,
        tokenizer: Any,
        prompts: Sequence[np.ndarray],
        stops: Sequence[Sequence[str]],
        emit: Callable[[int, str], object],
    ) -> None:
        self.by_logits = choice.by_logits
        self._choice = choice
        self._emit = emit
        both = enumerate(zip(prompts, stops, strict=True))
        self._open = {n: Decoder(tokenizer, prompt, stop) for n, (prompt, stop) in both}
        self.when_ended: Callable[[int], object] | None = None
        """Called with each row that has ended, after its last piece."""

    def choose(self, logits: Tensor, rows: Rows, token: Tokens) -> Tensor:
        return self._choice.choose(logits, rows, token)

    def ends(self, ids: Tensor, rows: Rows, token: Tokens) -> Tensor:
        ended = torch.zeros(len(ids), dtype=torch.bool)
        if self._choice.can_end:
            ended |= self._choice.ends(ids, rows, token)
        for place, (row, id) in enumerate(zip(rows, ids.tolist(), strict=True)):
            if row not in self._open:
                continue
            decoder = self._open[row]
            self._emit(row, decoder.add([id]))
            if decoder.stopped or ended[place]:
                ended[place] = True
                self._end(row)
        return ended

    def finish(self) -> None:
        """Pass on the text that is still held, after the last token."""
        for row in list(self._open):
            self._end(row)

    def _end(self, row: int) -> None:
        self._emit(row, self._open.pop(row).end())
        if self.when_ended is not None:
            self.when_ended(row)
