"""The workload of a run: the sizes from which its memory and time are computed."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from dataclasses import dataclass

from flexgen.errors import RequestError, shown
from flexgen.units import LARGEST_COUNT


@dataclass(frozen=True)
class Workload:
    """`num_prompts` prompts of `prompt_len` tokens, with `gen_len` new tokens for each.

    Shorter prompts are padded to `prompt_len`. Raises RequestError unless all three are integers from 1 to
    `LARGEST_COUNT`.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                kind = type(value).__name__
                raise RequestError(f"{field.name} is {shown(value)} ({kind}); it must be a whole number >= 1")
            if value < 1:
                raise RequestError(f"{field.name} is {shown(value)}; it must be at least 1")
            if (count := operator.index(value)) > LARGEST_COUNT:
                raise RequestError(f"{field.name} is {shown(value)}; it must be at most {LARGEST_COUNT}")
            object.__setattr__(self, field.name, count)

    @property
    def capacity(self) -> int:
        """The largest length of one row in the KV cache: the prompt and all its new tokens."""
        return self.prompt_len + self.gen_len
