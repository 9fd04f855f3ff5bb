"""How a call chooses each new token and ends rows, and who listens to new tokens."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexgen.runtime.draws import MAX_SEED, uniforms
from flexgen.runtime.sampler import sample

Rows = Sequence[int]
"""Numbers of prompts in the order of the caller. Those of a GPU batch are in any order, and others after rows have
left it."""


class Choice(Protocol):
    """Which id follows each row, and which rows end with it.

    It is asked for one GPU batch at a time. `ends` has returned for a row's token before `choose` is asked for the
    row's next one; another batch's calls may come between, and `ends` comes from another thread.
    """

    @property
    def whole_call(self) -> bool:
        """Whether it is asked for all rows of the call at once instead, in their order, once for each token.

        Such a call runs as one block. Rows that have ended stay, with the pad id as their next one, until all
        have. The lanes are idle while it is asked, in the thread of the call.
        """

    @property
    def can_end(self) -> bool:
        """Whether a row may end before the last token. If not, `ends` is not asked to say so."""

    def choose(self, logits: Tensor, rows: Rows, token: int) -> Tensor:
        """Ids (rows,) int64 of new token `token`, counted from 0, for logits (rows, vocab); `INVALID` for a row
        whose logits are NaN or infinite, so that none can be chosen.

        Both are on the compute device: this is a part of the computation. What it returns for a row that has ended
        is not used. The logits may be written to, but are not to be kept.
        """

    def ends(self, ids: Tensor, rows: Rows, token: int) -> Tensor:
        """Whether each row ends with the token, (rows,) bool.

        ids (rows,) int64 in host memory: what was chosen, the pad id for a row that had ended before.
        """


class Sampled:
    """The id that `sample` draws (temperature 0 takes the best one); a stop id ends its row.

    A draw depends on the seed (a random one if None), the token, and the row's number in the job: `first_row` plus
    its number in the call, or `first_row[number]` where the rows of the job do not follow one another.
    """

    whole_call = False

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        seed: int | None = None,
        first_row: int | Sequence[int] = 0,
    ) -> None:
        self._options = temperature, top_k, top_p
        self._draws = temperature > 0
        self._seed = secrets.randbits(64) if seed is None else int(seed)
        self._numbers = range(first_row, MAX_SEED) if isinstance(first_row, int) else first_row
        self._stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64)

    @property
    def can_end(self) -> bool:
        return bool(len(self._stop_ids))

    def choose(self, logits: Tensor, rows: Rows, token: int) -> Tensor:
        drawn = None
        if self._draws:
            drawn = uniforms(self._seed, [self._numbers[row] for row in rows], token, logits.device)
        return sample(logits, *self._options, uniforms=drawn)

    def ends(self, ids: Tensor, rows: Rows, token: int) -> Tensor:
        return torch.isin(ids, self._stop_ids)


@dataclass(frozen=True)
class NewIds:
    """One new token of each row of a GPU batch.

    `ids` (rows,) int64, of new token `token`, counted from 0. `live` (rows,) bool: not of a row that had ended
    before, whose id is the pad id. `ended` (rows,) bool: live, and its row's last one.
    """

    rows: Rows
    token: int
    ids: Tensor
    live: Tensor
    ended: Tensor


Listener = Callable[[NewIds], object]
"""Told of new ids as they come to host memory, in the thread that brings them there. A row's come in order, those
of different batches as they are computed. Rows that have ended may be left out. The tensors are not to be kept."""
