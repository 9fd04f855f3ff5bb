"""Checks the arguments of a call before any work is done."""

from __future__ import annotations

import functools
import logging
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from flexgen.errors import RequestError, shown
from flexgen.models import ModelSpec
from flexgen.units import LARGEST_COUNT

logger = logging.getLogger(__name__)

IdRows = Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray | Tensor
"""Prompts: a (prompts, prompt_len) array or tensor, or a list of id lists of any lengths."""

NewTokenCounts = int | Sequence[int] | np.ndarray
"""The maximum number of new tokens of every prompt, or one number for each prompt."""


@dataclass(frozen=True)
class Request:
    """Prompts without padding, and the width of the caller's array."""

    prompts: tuple[np.ndarray, ...]
    width: int
    columns: tuple[np.ndarray, ...]
    """The columns of each prompt's ids in the caller's array."""
    sorted_in: int | None = None
    """The number of adjacent prompts that are sorted by length together. None sorts all."""

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts))

    @property
    def prefix(self) -> int:
        """The number of ids with which all prompts begin, at least one fewer than the shortest has."""
        first, *others = self.prompts
        shared = min(map(len, self.prompts)) - 1
        for prompt in others:
            unlike = np.flatnonzero(first[:shared] != prompt[:shared])
            shared = int(unlike[0]) if len(unlike) else shared
        return shared

    def only(self, rows: Sequence[int]) -> Request:
        """The prompts with these numbers, in this order."""
        prompts, columns = (tuple(some[n] for n in rows) for some in (self.prompts, self.columns))
        return replace(self, prompts=prompts, columns=columns)

    def after(self, prefix: int) -> Request:
        """The request without the first `prefix` ids of each prompt."""
        prompts = tuple(prompt[prefix:] for prompt in self.prompts)
        return replace(self, prompts=prompts) if prefix else self

    def blocks(self, size: int) -> list[list[int]]:
        """The prompts' numbers in blocks of `size`, longest first. Adjacent prompts have similar lengths, so that the
        rows of a batch need little padding."""
        together = self.sorted_in or len(self.prompts)
        order = sorted(range(len(self.prompts)), key=lambda n: (n // together, -len(self.prompts[n])))
        return [order[n : n + size] for n in range(0, len(order), size)]


def read_request(spec: ModelSpec, inputs: IdRows, attention_mask: Any = None) -> Request:
    """Check prompts and remove their padding.

    `attention_mask` (prompts, prompt_len) marks padding at either end of a row with 0. Without a mask, the pad ids at
    the beginning of the rows of a rectangular array are padding, unless the model's pad id also ends texts.

    Raises RequestError for no prompts, an empty prompt, ids outside the vocabulary, ids that are not integers, and a
    mask with another shape, with holes, or with an empty row.
    """
    rows, rectangular = read_rows(inputs)
    if attention_mask is not None:
        kept = _unmasked(rows, attention_mask)
    elif rectangular and spec.pad_token_id is not None and spec.pad_token_id not in spec.eos_token_ids:
        kept = [np.arange(leading(row, spec.pad_token_id), len(row)) for row in rows]
    else:
        kept = [np.arange(len(row)) for row in rows]
    prompts = tuple(row[columns] for row, columns in zip(rows, kept, strict=True))
    for n, prompt in enumerate(prompts):
        if not len(prompt):
            raise RequestError(f"prompt {n} is empty: give at least one id, for example the model's bos id")
        worst = prompt.min() if prompt.min() < 0 else prompt.max()
        if not 0 <= worst < spec.vocab_size:
            raise RequestError(
                f"prompt {n} has id {shown(worst)}, but the vocabulary of {spec.name} is 0 to {spec.vocab_size - 1}: "
                "use the tokenizer of this model"
            )
    return Request(prompts, max(map(len, rows)), tuple(kept))


def read_rows(inputs: IdRows) -> tuple[list[np.ndarray], bool]:
    """The prompts as int64 rows, including padding, and whether they come from a rectangular array.

    Raises RequestError if there are no prompts, or if a row does not consist of integers.
    """
    if isinstance(inputs, Tensor):
        if inputs.dtype.is_floating_point:  # numpy lacks some of those
            raise RequestError(f"prompts contain {inputs.dtype} values; ids must be whole numbers")
        inputs = inputs.detach().cpu().numpy()
    if isinstance(inputs, np.ndarray) and inputs.ndim != 2:
        raise RequestError(f"prompts have shape {inputs.shape}; they must be (prompts, prompt_len)")
    if isinstance(inputs, str) or not isinstance(inputs, Sequence | np.ndarray):
        hint = ", such as its input_ids" if isinstance(inputs, Mapping) else ""
        raise RequestError(
            f"prompts are a {type(inputs).__name__}; give ids: an array, a tensor or a list of lists{hint}"
        )
    if not len(inputs):
        raise RequestError("there are no prompts: give at least one")
    rows = []
    for n, given in enumerate(inputs):
        try:
            row = np.asarray(given if not isinstance(given, Tensor) else given.cpu())
        except (TypeError, ValueError) as error:
            raise RequestError(f"prompt {n} is not a list of ids: {shown(error)}") from None
        if row.ndim != 1:
            raise RequestError(
                f"prompt {n} is {shown(given)}; it must be a list of ids (wrap one prompt in a list)"
            )
        if len(row) and row.dtype.kind not in "iu":
            raise RequestError(f"prompt {n} contains {row.dtype} values; ids must be whole numbers")
        rows.append(row.astype(np.int64))
    return rows, isinstance(inputs, np.ndarray) or len({len(row) for row in rows}) == 1


def leading(row: np.ndarray, pad_id: int) -> int:
    """The number of pad ids at the beginning of a row."""
    other = np.flatnonzero(row != pad_id)
    return int(other[0]) if len(other) else len(row)


def _unmasked(rows: Sequence[np.ndarray], attention_mask: Any) -> list[np.ndarray]:
    if isinstance(attention_mask, Tensor):
        attention_mask = attention_mask.detach().cpu()
        if attention_mask.dtype.is_floating_point:  # numpy lacks some of those
            attention_mask = attention_mask.float()
        attention_mask = attention_mask.numpy()
    one_dim = isinstance(attention_mask, np.ndarray) and attention_mask.ndim != 2
    if (
        isinstance(attention_mask, str | bytes)
        or not isinstance(attention_mask, Sequence | np.ndarray)
        or one_dim
    ):
        raise RequestError("attention_mask must have one row of 0 and 1 for each prompt")
    if len(attention_mask) != len(rows):
        raise RequestError(f"attention_mask has {len(attention_mask)} rows for {len(rows)} prompts")
    kept = []
    for n, (row, given) in enumerate(zip(rows, attention_mask, strict=True)):
        mask = _mask_row(n, given)
        if mask.shape != row.shape:
            raise RequestError(f"attention_mask row {n} has {len(mask)} entries for {len(row)} ids")
        columns = np.flatnonzero(mask)
        if not len(columns):
            raise RequestError(f"attention_mask row {n} is all zero: the prompt would be empty")
        if len(columns) != columns[-1] - columns[0] + 1:
            raise RequestError(f"attention_mask row {n} has a hole: only padding at the ends can be masked")
        kept.append(columns)
    return kept


def _mask_row(n: int, given: Any) -> np.ndarray:
    """One row of a mask. Raises RequestError for values other than 0 and 1 (of any numeric type, or booleans)."""
    if isinstance(given, Tensor):
        given = given.detach().cpu().tolist()
    try:
        mask = np.asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"attention_mask row {n} is not a list of 0 and 1: {shown(error)}") from None
    if mask.ndim != 1:
        raise RequestError(
            f"attention_mask must have one row of 0 and 1 for each prompt; row {n} is {shown(given)}"
        )
    if len(mask) and mask.dtype.kind not in "biuf":
        raise RequestError(f"attention_mask row {n} contains {mask.dtype} values; it must contain 0 and 1")
    wrong = mask[(mask != 0) & (mask != 1)]  # includes NaN
    if len(wrong):
        raise RequestError(
            f"attention_mask row {n} contains {shown(wrong[0])}; it must contain 0 for padding and 1 for ids"
        )
    return mask


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise RequestError unless `value` is an integer (Python or numpy) of at least `least` and at most `most`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        limit = "" if most is None else f" and <= {most}"
        raise RequestError(f"{name} is {shown(value)}; it must be a whole number >= {least}{limit}")


def check_bool(name: str, value: object) -> None:
    """Raise RequestError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} is {shown(value)}; it must be True or False")


def new_token_counts(spec: ModelSpec, request: Request, max_new_tokens: NewTokenCounts) -> list[int]:
    """The maximum number of new tokens of each prompt.

    Raises RequestError unless `max_new_tokens` is a valid number, or one for each prompt, and each fits after its
    prompt.
    """
    given: Any = max_new_tokens
    if isinstance(given, np.ndarray | Tensor):
        given = given.tolist()
    one_number = isinstance(given, str) or not isinstance(given, Sequence)
    if one_number:
        check_length(spec, request, given)
        return [int(given)] * len(request.prompts)
    if len(given) != len(request.prompts):
        raise RequestError(
            f"max_new_tokens has {len(given)} numbers for {len(request.prompts)} prompts; give one number, or one "
            "for each prompt"
        )
    for row, (prompt, count) in enumerate(zip(request.prompts, given, strict=True)):
        check_whole(f"max_new_tokens[{row}]", count, 1, LARGEST_COUNT)
        check_room(spec, f"prompt {row}", len(prompt), count)
    return [int(count) for count in given]


def check_length(spec: ModelSpec, request: Request, max_new_tokens: int) -> None:
    """Raise RequestError unless `max_new_tokens` is a valid number and fits after every prompt."""
    check_whole("max_new_tokens", max_new_tokens, 1, LARGEST_COUNT)
    check_positions(spec, request, max_new_tokens)


def check_positions(spec: ModelSpec, request: Request, new_tokens: int) -> None:
    """Raise RequestError unless every prompt with `new_tokens` more tokens fits the model's positions."""
    row = max(range(len(request.prompts)), key=lambda n: len(request.prompts[n]))
    check_room(spec, f"prompt {row}", request.longest, new_tokens)


def check_room(spec: ModelSpec, prompt: str, length: int, new_tokens: int) -> None:
    """Raise RequestError if `length` ids and `new_tokens` more exceed a learned table of positions.

    Rotary positions have no limit. Beyond the context length of the model, a warning is logged once and the text
    continues, as in transformers. prompt: the name of the prompt in messages.
    """
    total = length + new_tokens
    if total <= spec.max_positions:
        return
    positions = f"the {spec.max_positions} positions of {spec.name}"
    if total <= spec.longest_text:
        _warn_once(f"a text exceeds {positions}: its quality may degrade beyond them")
        return
    if not new_tokens:
        raise RequestError(f"{prompt} has {length} ids, which exceed {positions}. Shorten it")
    room = spec.max_positions - length
    fewer = f" or ask for at most {room} new tokens" if room > 0 else ""
    raise RequestError(
        f"{prompt} has {length} ids and {shown(new_tokens)} more are requested: {shown(total)} exceed {positions}. "
        f"Shorten the prompt{fewer}"
    )


@functools.lru_cache(maxsize=128)
def _warn_once(message: str) -> None:
    logger.warning(message)


def stop_ids(spec: ModelSpec, stop: int | Iterable[int] | None) -> tuple[int, ...]:
    """The ids that end a row: `stop`, or the model's end ids for None. With an empty `stop`, rows never end early."""
    if stop is None:
        return spec.eos_token_ids
    if isinstance(stop, np.ndarray | Tensor):
        stop = stop.reshape(-1).tolist()
    ids = tuple(stop) if isinstance(stop, Iterable) else (stop,)
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise RequestError(f"stop contains {shown(value)}; give one id, several ids, or () to never stop")
        if not 0 <= int(value) < spec.vocab_size:
            raise RequestError(
                f"stop id {shown(value)} is outside the vocabulary, 0 to {spec.vocab_size - 1}"
            )
    return tuple(int(value) for value in ids)


def pad_id(spec: ModelSpec) -> int:
    """The id after the end of a row: the model's pad id, else an id that ends texts, else 0."""
    if spec.pad_token_id is not None:
        return spec.pad_token_id
    return spec.eos_token_ids[0] if spec.eos_token_ids else 0
