"""Text in and out: a model's tokenizer, text from ids as they come, and where a text stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from flexgen.errors import ModelError, RequestError, shown
from flexgen.models.plain_files import check_file

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files of which a tokenizer needs one: without any transformers would make an empty one for some models."""
_CONTEXT = 5
"""Ids before a text that are decoded with it: some tokenizers drop the space that a text begins with."""
_MOST_CONTEXT = 16
"""Ids before a text that are tried, so that decoding does not begin inside a character."""
_MOST_PENDING = 4
"""Ids that a character has at most: each stands for at least one of its bytes."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Messages = Sequence[Mapping[str, str]]
"""A conversation: messages with a `role` and a `content` each."""


def load_tokenizer(directory: Path | None, model: str) -> Any:
    """The tokenizer in `directory`, where `model` was found; the network is not asked.

    Raises ModelError where there is none, or none that transformers can read, and CheckpointError where one of its
    files is a Git LFS pointer or a link to nothing.
    """
    if directory is None or not any(file for name in _VOCABULARIES for file in directory.glob(name)):
        where = (
            f"{model} comes without files" if directory is None else f"no {_VOCABULARIES[0]} in {directory}"
        )
        raise ModelError(
            f"{model} has no tokenizer ({where}): put its tokenizer files beside its config, or give ids"
        )
    for name in (*_VOCABULARIES, "tokenizer_config.json", "merges.txt"):
        for file in directory.glob(name):
            check_file(file)
    from transformers import AutoTokenizer  # takes seconds, and ids need no tokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # of whatever kind: files of any origin are read by code of many authors
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{directory}: the tokenizer cannot be read: {reason}") from error


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The ids of a text, with those that the tokenizer begins texts with if `special`.

    A text that begins with the tokenizer's BOS token, as a rendered chat does, does not get a second one.
    Raises RequestError for what is not a text, and for one that cannot be encoded as UTF-8.
    """
    if not isinstance(text, str):
        raise RequestError(f"a text is a {type(text).__name__}; it must be a string")
    if not isinstance(special, bool):
        raise RequestError(f"special_tokens is {shown(special)}; it must be True or False")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text is not valid Unicode at character {error.start}: {error.reason}"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        return ids[1:]
    return ids


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, neither a text nor ids."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode_chat(tokenizer: Any, messages: Messages) -> list[int]:
    """The ids of a conversation up to where the model answers.

    Raises RequestError for a message without `role` and `content`, and ModelError if the tokenizer has no chat
    template or its template refuses the messages.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(
                f"message {number} of a chat is {shown(message)}; it must have a 'role' and a 'content'"
            )
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template; give texts or ids in the format that the model was trained with"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program in files of any origin
        raise ModelError(f"the tokenizer's chat template failed: {error}") from error
    return encode(tokenizer, text, special=False)  # the template wrote the special tokens


def stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """`stop` as a tuple of strings. Raises RequestError for anything else, and for an empty string."""
    if not isinstance(stop, Iterable) or getattr(stop, "shape", None) == ():
        raise RequestError(f"stop is {shown(stop)}; give a text, several texts, or () for none")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for value in stops:
        if not isinstance(value, str) or not value:
            raise RequestError(
                f"stop contains {shown(value)}; give a text or several texts that end a completion"
            )
    return stops


class Decoder:
    """The text of one completion, piece by piece as its ids come, up to the first stop string.

    tokenizer: its special tokens are not shown. prompt: the ids before the completion. stop: strings of which the
    first to be complete ends the text, which does not contain it. They are looked for in the text with its special
    tokens, so that a special token can be a stop string, and none matches across one that is not shown.

    However the ids are divided among calls, the text is the same, that of ids that come one by one. It holds whole
    characters; where it ends inside one, a single replacement character stands for it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] | np.ndarray, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)
        self._pending: list[int]
        self._begin_behind([int(id) for id in prompt[-_MOST_CONTEXT:]])
        self._stop = stop
        self._held = ""  # made, and not yet sure to be no stop string
        self._shown: list[bool] = []  # of each character of `_held`
        self.stopped = False
        """Whether a stop string came."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that is sure now. A character whose bytes are not all there waits, and so does what may be
        the beginning of a stop string."""
        new = [int(id) for id in ids]
        if (text := self._at_once(new)) is not None:
            return text
        return "".join(map(self._add, new))

    def end(self) -> str:
        """What was waiting."""
        if self.stopped:
            return ""
        text = self._up_to_stop(self._rest(), shown=True)
        text += self._take(len(self._held))
        return text

    def _at_once(self, ids: Sequence[int]) -> str | None:
        """The text of many ids in one step, None where going one by one may give another one."""
        if self._stop or self._pending or len(ids) <= _MOST_PENDING:
            return None
        ids = [id for id in ids if id not in self._special]
        both = self._text(self._context + ids)
        if _UNFINISHED in both or not both.startswith(self._before):
            return None
        text = both[len(self._before) :]
        self._begin_behind([*self._context, *ids][-_MOST_CONTEXT:])
        return text

    def _add(self, id: int) -> str:
        if self.stopped:
            return ""
        if id in self._special:  # no character goes on across one
            text = self._up_to_stop(self._rest(), shown=True)
            return text + self._up_to_stop(self._special[id], shown=False)
        self._pending.append(id)
        text = self._decode_pending()
        if not text.endswith(_UNFINISHED):
            self._keep_as_context(text)
            return self._up_to_stop(text, shown=True)
        if len(self._pending) < _MOST_PENDING:
            return ""
        # No character has so many ids: the first is none, but the others may begin one.
        first, *others = self._pending
        self._pending = [first]
        text = self._rest()
        self._pending = others
        return self._up_to_stop(text, shown=True)

    def _begin_behind(self, prompt: list[int]) -> None:
        """Choose the ids of the prompt that are the first context: they decode to whole characters.

        A character that the prompt leaves unfinished belongs to the completion.
        """
        prompt = [id for id in prompt if id not in self._special]
        self._context, self._before, self._pending, self._begun = [], "", [], ""
        for end in range(len(prompt), max(len(prompt) - _MOST_PENDING, 0), -1):
            for begin in range(max(end - _CONTEXT, 0), -1, -1):
                before = self._text(prompt[begin:end])
                if not before.startswith(_UNFINISHED) and not before.endswith(_UNFINISHED):
                    self._context, self._before, self._pending = prompt[begin:end], before, prompt[end:]
                    self._begun = self._text(prompt[begin:]) if self._pending else ""
                    return

    def _decode_pending(self) -> str:
        """The text of the pending ids, behind that of the context."""
        both = self._text(self._context + self._pending)
        if self._begun and both.startswith(self._begun):  # the prompt's last bytes are no part of a character
            return both[len(self._begun) :]
        if both.startswith(self._before):
            return both[len(self._before) :]
        # Bytes that are no character can spoil those before them, in tokenizers that fall back to bytes.
        return self._text(self._pending)

    def _keep_as_context(self, text: str) -> None:
        if text and not text.endswith(_UNFINISHED):
            self._context, self._before = self._pending, self._text(self._pending)
        elif text:
            self._context, self._before = [], ""
        self._pending, self._begun = [], ""

    def _rest(self) -> str:
        """The text of what is pending, when nothing can complete it any more."""
        if not self._pending:
            return ""
        text = self._decode_pending()
        self._keep_as_context(text)
        whole = text.rstrip(_UNFINISHED)
        return whole if whole == text else whole + _UNFINISHED

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _up_to_stop(self, text: str, shown: bool) -> str:
        """Take `text` as made; returns what is sure now of the text that is shown."""
        if self.stopped:
            return ""
        self._held += text
        self._shown += [shown] * len(text)
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, sure = min(found)  # the one that is complete first, as if characters came one by one
            text = self._take(sure)
            self._held, self._shown = "", []
            return text
        return self._take(min((_begins(self._held, stop) for stop in self._stop), default=len(self._held)))

    def _take(self, count: int) -> str:
        """Remove so much of what is held; returns what is shown of it."""
        taken = "".join(c for c, shown in zip(self._held[:count], self._shown, strict=False) if shown)
        self._held, self._shown = self._held[count:], self._shown[count:]
        return taken


_special: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens of a tokenizer, which decoding leaves out: texts by id."""
    count = len(tokenizer)  # it grows with each token that is added
    if tokenizer not in _special or _special[tokenizer][0] != count:
        added = tokenizer.added_tokens_decoder.items()
        _special[tokenizer] = count, {id: token.content for id, token in added if token.special}
    return _special[tokenizer][1]


def _begins(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that is the beginning of `stop`; its length if there is none."""
    first = max(len(text) - len(stop) + 1, 0)
    return next((at for at in range(first, len(text)) if stop.startswith(text[at:])), len(text))
