"""What a call generates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexgen.models import ModelSpec
from flexgen.runtime.choice import Choice
from flexgen.runtime.request import Request, check_length, pad_id


@dataclass(frozen=True)
class Completion:
    """New tokens for prompts that `read_request` has read.

    choice: chooses each of them. It knows a prompt by its number in the request.
    tokens: how many of `max_new_tokens` are run; the rest of the result is pad ids. None runs all.
    pad: the id after a row that has ended; None is the model's pad id.
    """

    request: Request
    max_new_tokens: int
    choice: Choice
    tokens: int | None = None
    pad: int | None = None

    def check(self, spec: ModelSpec) -> None:
        """Raises RequestError for a length that the model does not have."""
        check_length(spec, self.request, self.max_new_tokens)

    @property
    def run(self) -> int:
        """How many new tokens are run."""
        return self.max_new_tokens if self.tokens is None else self.tokens

    def pad_id(self, spec: ModelSpec) -> int:
        return pad_id(spec) if self.pad is None else self.pad

    def blank(self, pad: int) -> np.ndarray:
        """(prompts, width + max_new_tokens) int64: the prompts, with `pad` before and after them."""
        request = self.request
        out = np.full((len(request.prompts), request.width + self.max_new_tokens), pad, dtype=np.int64)
        for row, prompt in zip(out, request.prompts, strict=True):
            row[request.width - len(prompt) : request.width] = prompt
        return out
