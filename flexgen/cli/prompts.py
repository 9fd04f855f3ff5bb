"""Readers of prompt files: one text per line, one JSON object per line, or a JSON array."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.engine.text import encode, encode_chat
from flexgen.errors import RequestError

PROMPT, MESSAGES, COMPLETION = "prompt", "messages", "completion"
"""Fields of a prompt: the text to continue, or a chat to continue instead, and the field for the answer."""
OPTIONS, MAX_TOKENS = "options", "max_tokens"
"""The field with values for this prompt alone, and the one among them that limits its new tokens."""
MAX_NESTING = 100
"""The deepest nesting of arrays and objects in one line. Python's own limit depends on the caller's stack."""

_JSON_LINES = (".jsonl", ".ndjson")
_JSON = ".json"
_BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class PromptLine:
    """The fields of a prompt, including either PROMPT (a text) or MESSAGES, and the number of its first line."""

    number: int
    fields: dict[str, Any]


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark and with `\\n` as line end.

    Raises RequestError for other encodings, and OSError if the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        hint = " (it looks like UTF-16)" if data.startswith(_UTF_16_MARKS) else ""
        raise RequestError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.reason}{hint}; save it as UTF-8"
        ) from None
    return normalized(text)


def normalized(text: str) -> str:
    """`text` without a byte order mark and with `\\n` as line end."""
    return text.removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def read_prompts(path: str) -> list[PromptLine]:
    """The prompts of a file. The suffix of its name, in upper or lower case, sets the format.

    `.jsonl` and `.ndjson` files have one object per line, `.json` files one array of objects or texts. In any other
    file, each line is a prompt.

    Raises RequestError, with the line number, for an invalid prompt, and OSError if the file cannot be read.
    """
    text, kind = read_text(path), Path(path).suffix.lower()
    if kind == _JSON:
        found = list(_elements(path, text))
    else:
        lines = text.removesuffix("\n").split("\n") if text else []
        found = [(number, _parsed(path, number, line, kind)) for number, line in enumerate(lines, 1)]
    if not found:
        raise RequestError(f"{path} is empty; give a file with at least one prompt")
    return [PromptLine(number, _checked(path, number, value)) for number, value in found]


def encoded(tokenizer: Any, line: PromptLine, special_tokens: bool = True) -> list[int]:
    """The ids of a prompt, without special tokens of the tokenizer if not `special_tokens`; a chat has its own."""
    if MESSAGES in line.fields:
        return encode_chat(tokenizer, line.fields[MESSAGES])
    return encode(tokenizer, line.fields[PROMPT], special_tokens)


def at_line(path: str, number: int, message: object) -> RequestError:
    """`message` as an error with its location."""
    return RequestError(f"{path}, line {number}: {message}")


def _parsed(path: str, number: int, line: str, kind: str) -> Any:
    if not line.strip():
        hint = "" if kind in _JSON_LINES else " (use a .jsonl file for prompts of several lines)"
        raise at_line(path, number, f"the line is blank; write a prompt or remove the line{hint}")
    if kind not in _JSON_LINES:
        return line
    try:
        value, end = _decode(line, len(line) - len(line.lstrip()))
        if line[end:].strip():
            raise RequestError(
                f"not valid JSON: unexpected text from column {end + 1} on; write one object per line"
            )
    except json.JSONDecodeError as error:
        raise at_line(path, number, f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RequestError as error:
        raise at_line(path, number, error) from None
    if not isinstance(value, dict):
        raise at_line(
            path, number, f"{_SHAPE} (for a JSON array of prompts, use a file with the suffix .json)"
        )
    return value


def _elements(path: str, text: str) -> Iterator[tuple[int, Any]]:
    """The elements of the array in `text`, each with the number of its first line."""
    at = _next(text, 0)
    if not text[at:]:
        return
    if text[at] != "[":
        raise RequestError(
            f"{path} does not begin with [: a .json file contains one array of prompts; use the suffix .jsonl for a "
            "file with one object per line"
        )
    at, line, counted = _next(text, at + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = _decode(text, at)
            at = _next(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            if text[at] == ",":
                at = _next(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("Expecting value", text, at)
        except json.JSONDecodeError as error:
            raise at_line(
                path, error.lineno, f"not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        except RequestError as error:
            raise at_line(path, line, error) from None
        yield line, value
    if text[_next(text, at + 1) :]:
        raise RequestError(
            f"{path}: unexpected text after the array; a .json file contains one array of prompts"
        )


def _next(text: str, at: int) -> int:
    """The index of the next character that is not JSON whitespace."""
    while text[at : at + 1] and text[at] in " \t\n":
        at += 1
    return at


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and the index of its end.

    Raises JSONDecodeError for invalid JSON, and RequestError for values outside of JSON or too large.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise RequestError(_TOO_DEEP) from None
    except (json.JSONDecodeError, RequestError):
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise RequestError(f"not valid JSON: {error}") from None
    _check_nesting(value)
    return value, end


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise RequestError(f"{number} is outside the range of a float and cannot be copied to the answers")
    return value


def _constant(name: str) -> float:
    raise RequestError(f"{name} is not valid JSON; write null or a string")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_constant)
_TOO_DEEP = f"arrays and objects are nested more than {MAX_NESTING} levels deep"
_SHAPE = (
    f'a prompt must be an object with a text or a chat: {{"{PROMPT}": "..."}} or '
    f'{{"{MESSAGES}": [{{"role": "user", "content": "..."}}]}}'
)


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        inner = [each for each in level if isinstance(each, dict | list)]
        if not inner:
            return
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
    raise RequestError(_TOO_DEEP)


def _checked(path: str, number: int, value: Any) -> dict[str, Any]:
    """The fields of one prompt, checked so that they can be written to the answers."""
    fields = {PROMPT: value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or (PROMPT in fields) == (MESSAGES in fields):
        raise at_line(path, number, _SHAPE)
    if PROMPT in fields and (not isinstance(fields[PROMPT], str) or not fields[PROMPT]):
        raise at_line(path, number, _SHAPE)
    if MESSAGES in fields and not _is_chat(fields[MESSAGES]):
        raise at_line(path, number, f'"{MESSAGES}" must be a list of objects, each with a "role": {_SHAPE}')
    if COMPLETION in fields:
        raise at_line(path, number, f"the field {COMPLETION!r} is reserved for the answer; rename it")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise at_line(
            path, number, f"a text is not valid Unicode: {error.reason}; remove lone surrogates"
        ) from None
    return fields


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    )
