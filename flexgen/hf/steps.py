"""The choice of ids by transformers' processors and criteria, and records of scores and logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList

from flexgen.hf.processors import RowProcessors, independent_of_rows
from flexgen.kernels.largest import largest
from flexgen.kernels.workspaces import choice_rows
from flexgen.layout.needs import Need
from flexgen.policy import Tier
from flexgen.runtime.choice import NewIds, Rows, Tokens
from flexgen.runtime.draws import seed_from_torch, uniforms
from flexgen.runtime.sampler import draw_by_scores

_FEWER = 3 / 4
"""The share of `choice_rows` to process at once. Processors of transformers use up to 64 bytes for each score."""


class Record:
    """The result of `output_scores` or `output_logits`: float32 (rows, vocab) for each step, in host memory.

    Rows that were not computed because they had finished are zero. The memory is allocated with the first values.
    """

    def __init__(self, rows: int, steps: int, vocab: int) -> None:
        self._shape = steps, rows, vocab
        self._steps: Tensor | None = None

    def keep(self, values: Tensor, rows: Rows, step: int) -> None:
        if self._steps is None:
            with torch.inference_mode(False):  # the caller gets ordinary tensors
                self._steps = torch.zeros(self._shape)
        self._steps[step, list(rows)] = values.to("cpu", torch.float32)

    def taken(self, steps: int) -> tuple[Tensor, ...]:
        return () if self._steps is None else tuple(self._steps[:steps])


def record_needs(what: Sequence[str], rows: int, steps: int, vocab: int) -> list[Need]:
    """The memory of one `Record` for each name in `what`."""
    return [Need(Tier.CPU, name, "home", rows * steps * vocab * torch.float32.itemsize) for name in what]


def steps_asked(criteria: StoppingCriteriaList, prompt_len: int, max_length: int) -> int:
    """The maximum number of new tokens of a call, at least one.

    The smallest length among the criteria sets it. A length criterion of the caller replaces that for `max_length`.
    """
    lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
    return max(min(lengths, default=max_length) - prompt_len, 1)


@contextmanager
def _as_in_transformers() -> Iterator[None]:
    """Run the caller's code so that it creates ordinary tensors, which it can keep and use in other calls."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class IdsSoFar:
    """The ids of a call: (rows, prompt_len + steps) int64 in host memory.

    A row has the caller's ids, with their padding on the left, the new ids, and then `pad_id`.
    """

    def __init__(self, input_ids: Tensor, steps: int, pad_id: int) -> None:
        self._given = input_ids, steps, pad_id
        self.rows, self.prompt_len = input_ids.shape
        self.steps = 0
        """The number of new tokens of the longest row."""

    @cached_property
    def _ids(self) -> Tensor:
        """The ids, allocated at the first use. A call that does not fit is refused before that."""
        input_ids, steps, pad_id = self._given
        padding = torch.full((len(input_ids), steps), pad_id, dtype=torch.int64)
        return torch.cat([input_ids.cpu(), padding], dim=1)

    def before(self, rows: Rows, token: int) -> Tensor:
        """The ids (rows, prompt_len + token) of some rows, before new token `token`."""
        return self._ids[list(rows), : self.prompt_len + token]

    def add(self, new: NewIds) -> None:
        live = new.live.tolist()
        if any(live):
            self.steps = max(self.steps, new.token + 1)
        rows = [row for row, lives in zip(new.rows, live, strict=True) if lives]
        self._ids[rows, self.prompt_len + new.token] = new.ids[new.live]

    def sequences(self) -> Tensor:
        """The ids of all rows, up to the end of the longest row."""
        return self._ids[:, : self.prompt_len + self.steps]


class HFChoice:
    """Chooses ids like `GenerationMixin`, with its processors and criteria.

    Processors and criteria see the ids so far, so `ids.add` must be among the listeners of the call. Criteria are
    called for the rows of one GPU batch, with the ids of these rows so far. Processors are called for fewer rows at a
    time if their temporaries would exceed `choice_bytes`. If a processor or criterion needs all rows at every step,
    all of them are called with all rows of the call, as in transformers.
    """

    def __init__(
        self,
        ids: IdsSoFar,
        processors: RowProcessors,
        criteria: StoppingCriteriaList,
        do_sample: bool,
        scores: Record | None = None,
        logits: Record | None = None,
    ) -> None:
        self.whole_call = processors.whole_call or not independent_of_rows(criteria)
        self.by_logits = False  # processors see the ids so far
        self._ids = ids
        self._processors = processors
        self._criteria = criteria
        self._seed = seed_from_torch() if do_sample else None
        self._scores = scores
        self._logits = logits
        # Like transformers, pad finished rows only with an EOS criterion. Otherwise all rows continue to the end.
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._ended = torch.zeros(ids.rows, dtype=torch.bool)
        self._device = torch.device("cpu")

    @property
    def can_end(self) -> bool:
        # `steps` includes the length criteria; a subclass may do anything.
        return any(type(criterion) is not MaxLengthCriteria for criterion in self._criteria)

    @_as_in_transformers()
    def choose(self, logits: Tensor, rows: Rows, token: Tokens) -> Tensor:
        assert isinstance(token, int)  # the choice is not `by_logits`
        self._device = logits.device
        at_once = len(rows) if self.whole_call else max(int(choice_rows(logits.shape[1]) * _FEWER), 1)
        parts = [slice(n, n + at_once) for n in range(0, len(rows), at_once)]
        return torch.cat([self._choose(logits[part], rows[part], token) for part in parts])

    def _choose(self, logits: Tensor, rows: Rows, token: int) -> Tensor:
        scores = logits.to(torch.float32, copy=True)
        if self._logits is not None:
            self._logits.keep(scores, rows, token)
        if self._processors:
            scores = self._processors.of(rows)(self._ids.before(rows, token).to(logits.device), scores)
        if self._scores is not None:
            self._scores.keep(scores, rows, token)
        if self._seed is not None:
            return draw_by_scores(scores, uniforms(self._seed, rows, token, scores.device))
        return largest(scores)

    @_as_in_transformers()
    def ends(self, ids: Tensor, rows: Rows, token: Tokens) -> Tensor:
        assert isinstance(token, int)
        so_far = torch.cat([self._ids.before(rows, token), ids[:, None]], dim=1)
        if not self.whole_call:
            return self._criteria(so_far, None)
        scores = None if self._scores is None else self._scores.taken(token + 1)
        self._ended |= self._criteria(so_far.to(self._device), scores).cpu()
        return self._ended if self._pads else self._ended.all().expand(len(ids))
