"""Text: a model's tokenizer, decoding of ids as they arrive, and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from flexgen.errors import ModelError, RequestError, shown
from flexgen.models.folders import GGUF_SUFFIX
from flexgen.models.plain_files import check_file

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""A tokenizer needs one of these files. Without any, transformers makes an empty tokenizer for some models."""
_CONTEXT = 5
"""The number of ids before a text to decode with it, because some tokenizers drop a text's leading space."""
_MOST_CONTEXT = 16
"""The number of ids before a text in which to look for the start of a character."""
_MOST_PENDING = 4
"""The maximum number of ids of a character: each is at least one of its bytes, and it has at most 4."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Messages = Sequence[Mapping[str, str]]
"""A chat: messages, each with a `role` and a `content`."""


def load_tokenizer(place: Path | None, model: str) -> Any:
    """The tokenizer of `model` in `place`, a directory or a GGUF file. It does not use the network.

    Files of a tokenizer next to a GGUF file are preferred to the tokenizer in it, which takes longer to read.

    Raises ModelError if there is none or transformers cannot read it, and CheckpointError if one of its files is a
    Git LFS pointer or a broken link.
    """
    gguf = place if place is not None and place.suffix == GGUF_SUFFIX else None
    directory, options = place, dict[str, Any]()
    if gguf is not None:
        directory = gguf.parent
    if directory is None or not any(file for name in _VOCABULARIES for file in directory.glob(name)):
        if gguf is None:
            where = f"{model} has no files" if directory is None else f"no {_VOCABULARIES[0]} in {directory}"
            raise ModelError(
                f"{model} has no tokenizer ({where}): put its tokenizer files next to its config, or give ids"
            )
        directory, options = gguf.parent, {"gguf_file": gguf.name}
    for name in (*_VOCABULARIES, "tokenizer_config.json", "merges.txt"):
        for file in directory.glob(name):
            check_file(file)
    from transformers import AutoTokenizer  # takes seconds to import, and ids need no tokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
    except Exception as error:  # of any class: transformers reads these files with code of many authors
        reason = str(error).strip().partition("\n")[0]
        fix = "Put the files of the model's tokenizer next to it" if options else "Replace its files"
        raise ModelError(
            f"{gguf if options else directory}: the tokenizer cannot be read: {reason}. {fix}, or give ids"
        ) from error


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds if `special`.

    A text that starts with the tokenizer's BOS token, such as a rendered chat, does not get a second one.

    Raises RequestError if it is not a string, or cannot be encoded as UTF-8.
    """
    if not isinstance(text, str):
        raise RequestError(f"a text is {shown(text)} ({type(text).__name__}); it must be a string")
    if not isinstance(special, bool):
        raise RequestError(f"special_tokens is {shown(special)}; it must be True or False")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text is not valid Unicode at character {error.start}: {error.reason}; remove that character"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        return ids[1:]
    return ids


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, not a text or ids."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode_chat(tokenizer: Any, messages: Messages) -> list[int]:
    """The ids of a chat, up to the start of the model's answer.

    Raises RequestError for a message without `role` and `content`, and ModelError if the tokenizer has no chat
    template or its template raises an error.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(
                f"message {number} of a chat is {shown(message)}; it must have a 'role' and a 'content'"
            )
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template; give texts or ids in the format of the model's training"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and may raise anything
        raise ModelError(
            f"the tokenizer's chat template failed: {error}. Give only messages that the template accepts, or give "
            "the prompt as a text in the format of the model's training"
        ) from error
    return encode(tokenizer, text, special=False)  # the template has added the special tokens


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
    """Decodes one completion in pieces, as its ids arrive, up to the first stop string.

    tokenizer: special tokens are left out of the text.
    prompt: the ids before the completion.
    stop: the first of these strings to be complete ends the text, which does not contain it. The search covers
        special tokens too, so a special token can be a stop string, and no match spans one that is left out.

    The text does not depend on the division of the ids among calls. It consists of whole characters; if it ends
    inside a character, it has a single replacement character there.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] | np.ndarray, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)
        self._pending: list[int]
        self._begin_behind([int(id) for id in prompt[-_MOST_CONTEXT:]])
        self._stop = stop
        self._held = ""  # decoded, but possibly the start of a stop string
        self._shown: list[bool] = []  # for each character of `_held`, whether it belongs to the text
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, ids: Iterable[int]) -> str:
        """Add ids and return the text that is final. Incomplete characters and possible stop strings are held."""
        new = [int(id) for id in ids]
        if (text := self._at_once(new)) is not None:
            return text
        return "".join(map(self._add, new))

    def end(self) -> str:
        """Return the held text."""
        if self.stopped:
            return ""
        text = self._up_to_stop(self._rest(), shown=True)
        text += self._take(len(self._held))
        return text

    def _at_once(self, ids: Sequence[int]) -> str | None:
        """The text of many ids in one step, or None if decoding one by one may return another text."""
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
        if id in self._special:  # no character spans one
            text = self._up_to_stop(self._rest(), shown=True)
            return text + self._up_to_stop(self._special[id], shown=False)
        self._pending.append(id)
        text = self._decode_pending()
        if not text.endswith(_UNFINISHED):
            self._keep_as_context(text)
            return self._up_to_stop(text, shown=True)
        if len(self._pending) < _MOST_PENDING:
            return ""
        # No character has this many ids: the first id is not part of one, but the others may start one.
        first, *others = self._pending
        self._pending = [first]
        text = self._rest()
        self._pending = others
        return self._up_to_stop(text, shown=True)

    def _begin_behind(self, prompt: list[int]) -> None:
        """Choose the ids of the prompt that are the first context, which decode to whole characters.

        An incomplete character at the end of the prompt belongs to the completion.
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
        """The text of the pending ids, after the context."""
        both = self._text(self._context + self._pending)
        if self._begun and both.startswith(self._begun):  # the prompt's last bytes are not a character's
            return both[len(self._begun) :]
        if both.startswith(self._before):
            return both[len(self._before) :]
        # With byte fallback, invalid bytes can change the decoding of those before them.
        return self._text(self._pending)

    def _keep_as_context(self, text: str) -> None:
        if text and not text.endswith(_UNFINISHED):
            self._context, self._before = self._pending, self._text(self._pending)
        elif text:
            self._context, self._before = [], ""
        self._pending, self._begun = [], ""

    def _rest(self) -> str:
        """The text of the pending ids, which no other id can complete."""
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
        """Add decoded `text` and return the visible text that is final. `shown`: whether `text` is visible."""
        if self.stopped:
            return ""
        self._held += text
        self._shown += [shown] * len(text)
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, sure = min(found)  # the stop string that is complete first
            text = self._take(sure)
            self._held, self._shown = "", []
            return text
        return self._take(min((_begins(self._held, stop) for stop in self._stop), default=len(self._held)))

    def _take(self, count: int) -> str:
        """Remove `count` characters of the held text and return the visible ones."""
        taken = "".join(c for c, shown in zip(self._held[:count], self._shown, strict=False) if shown)
        self._held, self._shown = self._held[count:], self._shown[count:]
        return taken


_special: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """The texts of a tokenizer's special tokens, by id. Decoding leaves them out."""
    count = len(tokenizer)  # it grows with each token that is added
    if tokenizer not in _special or _special[tokenizer][0] != count:
        added = tokenizer.added_tokens_decoder.items()
        _special[tokenizer] = count, {id: token.content for id, token in added if token.special}
    return _special[tokenizer][1]


def _begins(text: str, stop: str) -> int:
    """The start of the longest suffix of `text` that is a prefix of `stop`; the length of `text` if there is none."""
    first = max(len(text) - len(stop) + 1, 0)
    return next((at for at in range(first, len(text)) if stop.startswith(text[at:])), len(text))
