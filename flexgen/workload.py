"""The workload of a run: the sizes from which its memory and time are computed."""

from __future__ import annotations

import math
import numbers
import operator
import random
from dataclasses import dataclass
from itertools import pairwise

from flexgen.errors import RequestError, shown
from flexgen.units import LARGEST_COUNT


@dataclass(frozen=True)
class Workload:
    """`num_prompts` prompts of `prompt_len` tokens, with `gen_len` new tokens for each.

    Shorter prompts are padded to `prompt_len`.

    prefix: the number of tokens with which all prompts begin, fewer than `prompt_len`.
    mean_new: the mean number of new tokens if rows may end early, from 1 to `gen_len`; None if all have `gen_len`.
    copied: the mean number of new tokens of a row in a pass with guesses (`Policy.guess`); 1 if no guess is right.
    cuts: where the prefix is divided into parts that are computed and stored one after another, because prompts of
        other groups share only the first ones. Token numbers in increasing order, from 1 to `prefix` - 1.
    groups: the number of groups of equally many prompts, each with its own prefix. All groups share the parts of the
        prefix before the last one; with one part, they share nothing.

    Raises RequestError for other values, unless the others are integers up to `LARGEST_COUNT`, and all but `prefix`
    at least 1.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int
    prefix: int = 0
    mean_new: float | None = None
    copied: float = 1.0
    cuts: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_len", "gen_len", "num_prompts", "prefix", "groups"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        object.__setattr__(self, "cuts", tuple(self.cuts))
        self._check_prefix()
        if self.mean_new is not None:
            if not _is_real(self.mean_new) or not 1 <= self.mean_new <= self.gen_len:
                raise RequestError(
                    f"mean_new is {shown(self.mean_new)}; it must be a number from 1 to gen_len, which is "
                    f"{self.gen_len}"
                )
            object.__setattr__(self, "mean_new", float(self.mean_new))
        if not _is_real(self.copied) or not 1 <= self.copied < math.inf:
            raise RequestError(
                f"copied is {shown(self.copied)}; it must be a finite number of at least 1: the mean number of new "
                "tokens of a row in a pass with guesses"
            )
        object.__setattr__(self, "copied", float(self.copied))

    def _check_prefix(self) -> None:
        if self.prefix >= self.prompt_len:
            raise RequestError(
                f"prefix is {self.prefix}, but the prompts have {self.prompt_len} tokens; it must be smaller, "
                "because at least the last token of a prompt is computed for each prompt"
            )
        ends = (0, *self.cuts, self.prefix)
        if self.cuts and any(begin >= end for begin, end in pairwise(ends)):
            raise RequestError(
                f"cuts are {shown(self.cuts)}; they must increase from 1 to {self.prefix - 1}, the last token number "
                "of the prefix"
            )
        if self.groups > self.num_prompts:
            raise RequestError(
                f"groups is {self.groups}, but there are {self.num_prompts} prompts; it must not be larger, because "
                "each group has at least one prompt"
            )

    @property
    def capacity(self) -> int:
        """The largest length of one row: the prompt and all its new tokens."""
        return self.prompt_len + self.gen_len

    @property
    def group_sizes(self) -> list[int]:
        """The number of prompts of each group, the largest first."""
        each, more = divmod(self.num_prompts, self.groups)
        return [each + 1] * more + [each] * (self.groups - more)

    def answers(self) -> list[int]:
        """The number of new tokens of each prompt, as predictions assume them.

        Without `mean_new`, all are `gen_len`. Otherwise they are the quantiles of a geometric distribution (each
        token ends its row with the same probability), cut off at `gen_len`, with the mean `mean_new`. Their order is
        random, and equal for equal workloads.
        """
        if self.mean_new is None or self.mean_new == self.gen_len:
            return [self.gen_len] * self.num_prompts
        if self.mean_new == 1:
            return [1] * self.num_prompts
        low, high = 0.0, 1.0  # the probability to continue
        for _ in range(60):
            going = (low + high) / 2
            mean = (1 - going**self.gen_len) / (1 - going)
            low, high = (going, high) if mean < self.mean_new else (low, going)
        left = ((n + 0.5) / self.num_prompts for n in range(self.num_prompts))
        counts = [min(max(math.ceil(math.log(share) / math.log(low)), 1), self.gen_len) for share in left]
        random.Random(0).shuffle(counts)
        return counts

    def passes(self, guess: int) -> list[int]:
        """The number of passes that give each prompt its `answers`, with up to `guess` guesses in a pass.

        Some rows copy whole answers and others nothing. So the passes of a row beyond the fewest possible ones are
        quantiles of an exponential distribution, with the mean that follows from `copied`, and cut off where a pass
        gives one token. Their order is random.
        """
        answers = self.answers()
        if not guess:
            return answers
        most = [new - 1 for new in answers]
        fewest = [-(-new // (1 + guess)) for new in most]
        spread = [-math.log((n + 0.5) / self.num_prompts) for n in range(self.num_prompts)]
        random.Random(1).shuffle(spread)

        def passes(scale: float) -> list[int]:
            rows = zip(fewest, spread, most, strict=True)
            return [min(few + round(scale * factor), new) for few, factor, new in rows]

        low, high = 0.0, 4.0 * self.gen_len * self.num_prompts  # all rows at their most
        for _ in range(60):
            middle = (low + high) / 2
            enough = sum(passes(middle)) * self.tokens_in_pass(guess) >= sum(most)
            low, high = (low, middle) if enough else (middle, high)
        return [1 + count for count in passes(high)]

    def tokens_in_pass(self, guess: int) -> float:
        """The expected number of new tokens of a row in a pass of the decode with up to `guess` guesses."""
        return min(self.copied, 1 + guess)


def _count(name: str, value: object) -> int:
    """`value` as an integer. Raises RequestError if it is none, too small or too large."""
    least = int(name != "prefix")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        kind = type(value).__name__
        raise RequestError(f"{name} is {shown(value)} ({kind}); it must be a whole number >= {least}")
    if value < least:
        raise RequestError(f"{name} is {shown(value)}; it must be at least {least}")
    if (count := operator.index(value)) > LARGEST_COUNT:
        raise RequestError(f"{name} is {shown(value)}; it must be at most {LARGEST_COUNT}")
    return count


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
