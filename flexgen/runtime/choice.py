"""The interfaces for the choice of new tokens, the end of rows, and listeners to new tokens."""

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
"""Numbers of prompts in the order of the caller. The rows of a GPU batch are in any order and change with
compaction."""

Tokens = int | Sequence[int]
"""The number of a new token of all rows, or that of each row."""


class Choice(Protocol):
    """Chooses the next id of each row, and the rows that end with it.

    Its methods are called for one GPU batch at a time. `ends` returns for a token of a row before `choose` is called
    for the row's next token. Calls for other batches may be in between, and another thread calls `ends`.
    """

    @property
    def whole_call(self) -> bool:
        """Whether its methods are called for all rows of the call together, in order, once for each token.

        Such a call runs as one block. Rows that have ended stay, with the pad id as their next id, until all rows
        have ended. The lanes are idle during the calls, which run in the thread of the call.
        """

    @property
    def can_end(self) -> bool:
        """Whether a row may end before the last token."""

    @property
    def by_logits(self) -> bool:
        """Whether `choose` depends only on the logits and on the numbers of the row and the token. Only then are
        guesses made: `choose` is called for the tokens after a guess before `ends` has returned for it, and again
        with the same numbers if the guess is wrong."""

    def choose(self, logits: Tensor, rows: Rows, token: Tokens) -> Tensor:
        """The ids (rows,) int64 of new token `token`, counted from 0, for logits (rows, vocab); `INVALID` for a row
        whose logits are NaN or infinite. The rows have different tokens only if the choice is `by_logits`.

        Both are on the compute device: the choice is part of the computation. The id of a row that has ended is not
        used. The method may write to the logits, but must not keep them.
        """

    def ends(self, ids: Tensor, rows: Rows, token: Tokens) -> Tensor:
        """Whether each row ends with the token, (rows,) bool.

        ids (rows,) int64 in host memory: the chosen ids, or the pad id for a row that has already ended.
        """


class Sampled:
    """Chooses the id that `sample` draws (the best one at temperature 0). A stop id ends its row.

    A draw depends on the seed (a random one if None), the token, and the row's number in the job. This number is
    `first_row` plus the number in the call, or `first_row[number]` if the rows are not consecutive in the job.
    """

    whole_call = False
    by_logits = True

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

    def choose(self, logits: Tensor, rows: Rows, token: Tokens) -> Tensor:
        drawn = None
        if self._draws:
            drawn = uniforms(self._seed, [self._numbers[row] for row in rows], token, logits.device)
        return sample(logits, *self._options, uniforms=drawn)

    def ends(self, ids: Tensor, rows: Rows, token: Tokens) -> Tensor:
        return torch.isin(ids, self._stop_ids)


class Limited:
    """Another choice, for rows that end after different numbers of tokens: row n after `counts[n]` at the latest."""

    can_end = True

    def __init__(self, choice: Choice, counts: Sequence[int]) -> None:
        self._choice = choice
        self._counts = torch.tensor(counts, dtype=torch.int64)
        self.whole_call = choice.whole_call
        self.by_logits = choice.by_logits

    def choose(self, logits: Tensor, rows: Rows, token: Tokens) -> Tensor:
        return self._choice.choose(logits, rows, token)

    def ends(self, ids: Tensor, rows: Rows, token: Tokens) -> Tensor:
        ended = self._counts[list(rows)] <= torch.as_tensor(token) + 1
        return ended | self._choice.ends(ids, rows, token) if self._choice.can_end else ended


class _ByRow:
    """A choice of its own for each prompt, in the order of the caller. Rows with the same one are chosen together."""

    whole_call = False

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = choices
        self.can_end = any(choice.can_end for choice in choices)
        self.by_logits = all(choice.by_logits for choice in choices)

    def choose(self, logits: Tensor, rows: Rows, token: Tokens) -> Tensor:
        groups = self._groups(rows)
        if len(groups) == 1:
            return groups[0][0].choose(logits, rows, token)
        ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for choice, places in groups:
            index = torch.tensor(places, device=logits.device)
            ids[index] = choice.choose(logits[index], [rows[n] for n in places], _tokens_at(places, token))
        return ids

    def ends(self, ids: Tensor, rows: Rows, token: Tokens) -> Tensor:
        ended = torch.zeros(len(rows), dtype=torch.bool)
        for choice, places in self._groups(rows):
            if choice.can_end:
                ended[places] = choice.ends(ids[places], [rows[n] for n in places], _tokens_at(places, token))
        return ended

    def _groups(self, rows: Rows) -> list[tuple[Choice, list[int]]]:
        """The places in `rows` of the prompts that have the same choice."""
        groups: dict[int, tuple[Choice, list[int]]] = {}
        for place, row in enumerate(rows):
            choice = self._choices[row]
            groups.setdefault(id(choice), (choice, []))[1].append(place)
        return list(groups.values())


def _tokens_at(places: Sequence[int], token: Tokens) -> Tokens:
    """`token` of the rows in these places."""
    return token if isinstance(token, int) else [token[n] for n in places]


def by_row(choices: Sequence[Choice]) -> Choice:
    """A choice that is `choices[row]` for each prompt. None of them may have `whole_call`."""
    return choices[0] if all(choice is choices[0] for choice in choices) else _ByRow(choices)


def limited(choice: Choice, counts: Sequence[int]) -> Choice:
    """`choice` for rows of at most `counts` tokens. It is unchanged if these are equal."""
    return choice if len(set(counts)) == 1 else Limited(choice, counts)


@dataclass(frozen=True)
class NewIds:
    """One new token of each row of a GPU batch.

    `ids` (rows,) int64: the ids of new token `token`, counted from 0. `live` (rows,) bool: False for rows that ended
    before, whose id is the pad id. `ended` (rows,) bool: live and the last token of the row.
    """

    rows: Rows
    token: int
    ids: Tensor
    live: Tensor
    ended: Tensor


Listener = Callable[[NewIds], object]
"""Called with new ids when they arrive in host memory, in the thread that copies them. The ids of a row arrive in
order, and those of different batches as they are computed. Rows that have ended may be omitted. The listener must not
keep the tensors."""
