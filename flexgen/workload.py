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

    Shorter prompts are padded to `prompt_len`. prefix: the number of tokens with which all prompts begin, fewer than
    `prompt_len`. Raises RequestError unless all are integers up to `LARGEST_COUNT`, and the others at least 1.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int
    prefix: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name != "prefix")
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                kind = type(value).__name__
                raise RequestError(
                    f"{field.name} is {shown(value)} ({kind}); it must be a whole number >= {least}"
                )
            if value < least:
                raise RequestError(f"{field.name} is {shown(value)}; it must be at least {least}")
            if (count := operator.index(value)) > LARGEST_COUNT:
                raise RequestError(f"{field.name} is {shown(value)}; it must be at most {LARGEST_COUNT}")
            object.__setattr__(self, field.name, count)
        if self.prefix >= self.prompt_len:
            raise RequestError(
                f"prefix is {self.prefix}, but the prompts have {self.prompt_len} tokens; it must be smaller, "
                "because at least the last token of a prompt is computed for each prompt"
            )

    @property
    def capacity(self) -> int:
        """The largest length of one row: the prompt and all its new tokens."""
        return self.prompt_len + self.gen_len
