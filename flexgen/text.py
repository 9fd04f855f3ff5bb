"""Text in and out: a model's tokenizer, text from ids as they come, and where a text stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from flexgen.errors import ModelError, RequestError

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files of which a tokenizer needs one: without any transformers would make an empty one for some models."""
_CONTEXT = 5
"""Ids before a text that are decoded with it: some tokenizers drop the space that a text begins with."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(directory: Path | None, model: str) -> Any:
    """The tokenizer in `directory`, where `model` was found; the network is not asked.

    Raises ModelError where there is none, or none that transformers can read.
    """
    if directory is None or not any(file for name in _VOCABULARIES for file in directory.glob(name)):
        where = (
            f"{model} comes without files" if directory is None else f"no {_VOCABULARIES[0]} in {directory}"
        )
        raise ModelError(
            f"{model} has no tokenizer ({where}): put its tokenizer files beside its config, or give ids"
        )
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # of whatever kind: files of any origin are read by code of many authors
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{directory}: the tokenizer cannot be read: {reason}") from error


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The ids of a text, with those that the tokenizer begins texts with if `special`.

    Raises RequestError for what is no text, and for one that cannot be encoded as UTF-8.
    """
    if not isinstance(text, str):
        raise RequestError(f"a text is a {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text is not valid Unicode at character {error.start}: {error.reason}"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation, each message with its `role` and `content`, up to where the model answers.

    Raises ModelError if the tokenizer's template refuses the messages.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program in files of any origin
        raise ModelError(f"the tokenizer's chat template failed: {error}") from error
    return encode(tokenizer, text, special=False)  # the template wrote the special tokens


def stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """`stop` as a tuple of strings. Raises RequestError for anything else, and for an empty string."""
    if not isinstance(stop, Iterable):
        raise RequestError(f"stop is {stop!r}; it takes a text, several, or () for none")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for value in stops:
        if not isinstance(value, str) or not value:
            raise RequestError(f"stop holds {value!r}; it takes a text, or several, that end a completion")
    return stops


class Decoder:
    """The text of one completion, piece by piece as its ids come, up to the first stop string.

    tokenizer: its special tokens are left out. prompt: the ids before the completion. stop: strings of which the
    first to be complete ends the text, which does not contain it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] | np.ndarray, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._told = [int(id) for id in prompt[-_CONTEXT:]]
        self._new: list[int] = []
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string came."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that is sure now. A character whose bytes are not all there waits, and so does what may be
        the beginning of a stop string."""
        if self.stopped:
            return ""
        self._new += [int(id) for id in ids]
        return self._up_to_stop(self._decode(last=False))

    def end(self) -> str:
        """What was waiting."""
        if self.stopped:
            return ""
        text = self._up_to_stop(self._decode(last=True))
        text, self._held = text + self._held, ""
        return text

    def _decode(self, last: bool) -> str:
        """The text of the new ids, after that of the ids before them."""
        before, both = self._text(self._told), self._text(self._told + self._new)
        if len(both) <= len(before) or (both.endswith(_UNFINISHED) and not last):
            return ""
        self._told, self._new = self._new, []
        return both[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _up_to_stop(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, sure = min(found)  # the one that is complete first, as if characters came one by one
            self._held = ""
            return text[:sure]
        sure = min((_begins(text, stop) for stop in self._stop), default=len(text))
        self._held = text[sure:]
        return text[:sure]


def _begins(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that is the beginning of `stop`; its length if there is none."""
    first = max(len(text) - len(stop) + 1, 0)
    return next((at for at in range(first, len(text)) if stop.startswith(text[at:])), len(text))
