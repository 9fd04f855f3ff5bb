"""transformers' processors and criteria, run for one GPU batch after another, and what they saw and gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
)

from flexgen.errors import UnsupportedError
from flexgen.memory.needs import Need
from flexgen.policy import Tier
from flexgen.runtime.choice import NewIds, Rows


class RowProcessors:
    """A call's logits processors, made anew for the rows of each GPU batch: some hold a value for each row.

    `build` makes the list for rows of the call. The first list, for all rows, shows at once what is not valid.

    Raises UnsupportedError for a processor that counts on seeing the same rows at every step: a batch's rows change
    when some that have ended leave it.
    """

    def __init__(self, build: Callable[[Rows], LogitsProcessorList], rows: int) -> None:
        self._build = build
        whole = tuple(range(rows))
        self._made: dict[tuple[int, ...], LogitsProcessorList] = {whole: build(whole)}
        self.empty = not self._made[whole]
        if any(isinstance(made, SynthIDTextWatermarkLogitsProcessor) for made in self._made[whole]):
            raise UnsupportedError(
                "SynthID watermarking is not supported: it remembers what each row of a batch had, and rows change "
                "batches here; WatermarkingConfig works"
            )

    def of(self, rows: Rows) -> LogitsProcessorList:
        key = tuple(rows)
        if key not in self._made:
            self._made[key] = self._build(key)
        return self._made[key]


class Record:
    """What `output_scores` or `output_logits` asks for: float32 (rows, vocab) of each step, in host memory.

    Zero where a row had ended and was not computed any more. Memory is taken when the first values come.
    """

    def __init__(self, rows: int, steps: int, vocab: int) -> None:
        self._shape = steps, rows, vocab
        self._steps: Tensor | None = None

    def keep(self, values: Tensor, rows: Rows, step: int) -> None:
        if self._steps is None:
            with torch.inference_mode(False):  # the caller's tensors are as any others
                self._steps = torch.zeros(self._shape)
        self._steps[step, list(rows)] = values.to("cpu", torch.float32)

    def taken(self, steps: int) -> tuple[Tensor, ...]:
        return () if self._steps is None else tuple(self._steps[:steps])


def record_needs(what: Sequence[str], rows: int, steps: int, vocab: int) -> list[Need]:
    """Bytes of one `Record` for each name in `what`."""
    return [Need(Tier.CPU, name, "home", rows * steps * vocab * torch.float32.itemsize) for name in what]


def steps_asked(criteria: StoppingCriteriaList, prompt_len: int, max_length: int) -> int:
    """New tokens that a call makes at most, at least one: up to the least length among the criteria, where one of the
    caller's own takes the place of the one that stands for `max_length`."""
    lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
    return max(min(lengths, default=max_length) - prompt_len, 1)


class HFChoice:
    """Chooses as `GenerationMixin` does, with its processors and criteria.

    It is passed twice, as the choice and its `listen` among the listeners: processors and criteria are given the ids
    so far, which only listening adds.

    `ids` (rows, prompt_len + steps) are the caller's, left-padded as they came; what rows get is added to them.
    Processors and criteria are called for the rows of one GPU batch, with the ids of these rows so far.
    """

    def __init__(
        self,
        input_ids: Tensor,
        steps: int,
        pad_id: int,
        processors: RowProcessors,
        criteria: StoppingCriteriaList,
        do_sample: bool,
        scores: Record | None = None,
        logits: Record | None = None,
    ) -> None:
        self._prompt_len = input_ids.shape[1]
        padding = torch.full((len(input_ids), steps), pad_id, dtype=torch.int64)
        self.ids = torch.cat([input_ids.cpu(), padding], dim=1)
        self.steps = 0
        """Tokens of the row that got most."""
        self._processors = processors
        self._criteria = criteria
        self._do_sample = do_sample
        self._scores = scores
        self._logits = logits

    @property
    def can_end(self) -> bool:
        # `steps` has the lengths; a subclass may do anything.
        return any(type(criterion) is not MaxLengthCriteria for criterion in self._criteria)

    def choose(self, logits: Tensor, rows: Rows, token: int) -> Tensor:
        scores = logits.to(torch.float32, copy=True)
        if self._logits is not None:
            self._logits.keep(scores, rows, token)
        if not self._processors.empty:
            scores = self._processors.of(rows)(self._so_far(rows, token).to(logits.device), scores)
        if self._scores is not None:
            self._scores.keep(scores, rows, token)
        if self._do_sample:
            return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1)
        return scores.argmax(dim=-1)

    def ends(self, ids: Tensor, rows: Rows, token: int) -> Tensor:
        return self._criteria(torch.cat([self._so_far(rows, token), ids[:, None]], dim=1), None)

    def listen(self, new: NewIds) -> None:
        live = new.live.tolist()
        if any(live):
            self.steps = max(self.steps, new.token + 1)
        rows = [row for row, lives in zip(new.rows, live, strict=True) if lives]
        self.ids[rows, self._prompt_len + new.token] = new.ids[new.live]

    def _so_far(self, rows: Rows, token: int) -> Tensor:
        return self.ids[list(rows), : self._prompt_len + token]
