"""The request of one call: prompts, a number of new tokens and a choice of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flexgen.layout.prefix import sharing
from flexgen.models import ModelSpec
from flexgen.policy import Policy
from flexgen.runtime.choice import Choice
from flexgen.runtime.guesses import Guesses, Propose, copied
from flexgen.runtime.request import NewTokenCounts, Request, new_token_counts, pad_id
from flexgen.workload import Workload


@dataclass(frozen=True)
class Completion:
    """New tokens for prompts that `read_request` has read.

    max_new_tokens: of every prompt, or one number for each; then `choice` ends the rows (see `limited`).
    choice: chooses each token. It identifies a prompt by its number in the request.
    tokens: the number of tokens to run; the rest of the `most` are pad ids. None runs all.
    pad: the id that follows the end of a row; None is the model's pad id.
    propose: makes the guesses if the policy has them. They do not change the result.
    """

    request: Request
    max_new_tokens: NewTokenCounts
    choice: Choice
    tokens: int | None = None
    pad: int | None = None
    propose: Propose = copied

    def workload(self, spec: ModelSpec) -> Workload:
        """The workload of the call. If numbers of new tokens differ, it has their mean."""
        workload, counts = workload_of(spec, self.request, self.most), self.max_new_tokens
        if isinstance(counts, int) or min(counts) == max(counts):
            return workload
        return replace(workload, mean_new=sum(counts) / len(counts))

    @property
    def most(self) -> int:
        """The maximum number of new tokens of a prompt."""
        counts = self.max_new_tokens
        return counts if isinstance(counts, int) else int(max(counts))

    def check(self, spec: ModelSpec) -> None:
        """Raises RequestError if a text is longer than the model's positions."""
        new_token_counts(spec, self.request, self.max_new_tokens)

    @property
    def run(self) -> int:
        """The number of new tokens to run."""
        return self.most if self.tokens is None else self.tokens

    def guess(self, policy: Policy) -> int:
        """The maximum number of guesses of a row in a pass of the call.

        A choice of the whole call, or one that depends on the ids so far, makes one token of each row after another.
        A call that is cut makes no guesses, because its time per token stands for that of the other tokens.
        """
        cut = self.run < self.most
        if not policy.guess or cut or self.choice.whole_call:
            return 0
        return policy.guess if self.choice.by_logits else 0

    @property
    def may_enter_by_place(self) -> bool:
        """Whether prompts may enter in the places of single rows, at the rate of the policy.

        A choice that depends on the ids so far does not allow it: it would be called for places without a row.
        """
        return self.choice.by_logits and not self.choice.whole_call

    def ends_rows_apart(self, policy: Policy) -> bool:
        """Whether rows may end in different passes, so that prompts enter in places of rows that have ended."""
        if self.choice.can_end or self.guess(policy) > 0:
            return True
        return policy.prefill_rows > 0 or policy.reserves(self.most)

    def guesses(self, rows: Sequence[int], policy: Policy) -> Guesses | None:
        """The guesses for a block of the prompts with these numbers, or None if it makes none and all rows of a batch
        have the same number of cached tokens."""
        if not (guess := self.guess(policy)) and not policy.prefill_rows:
            return None
        return Guesses([self.request.prompts[row] for row in rows], self.run, guess, self.propose)

    def pad_id(self, spec: ModelSpec) -> int:
        return pad_id(spec) if self.pad is None else self.pad

    def blank(self, pad: int) -> np.ndarray:
        """(prompts, width + most) int64: the prompts, with `pad` before and after them."""
        request = self.request
        out = np.full((len(request.prompts), request.width + self.most), pad, dtype=np.int64)
        for row, prompt in zip(out, request.prompts, strict=True):
            row[request.width - len(prompt) : request.width] = prompt
        return out


def workload_of(spec: ModelSpec, request: Request, gen_len: int) -> Workload:
    """The workload of a request, with the prefix that its prompts can share."""
    return sharing(spec, Workload(request.longest, gen_len, len(request.prompts), request.prefix))
