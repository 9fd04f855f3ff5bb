"""Files that hold prompts: a text in each line, JSON in each line, or one JSON array."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.errors import RequestError

PROMPT, MESSAGES, COMPLETION = "prompt", "messages", "completion"
"""Fields: the text to continue, the chat to continue instead of one, and where the answer is put."""
MAX_NESTING = 100
"""Of arrays and objects in one line's fields. Python's own limit depends on who calls the parser."""

_JSON_LINES = (".jsonl", ".ndjson")
_JSON = ".json"
_BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class PromptLine:
    """A prompt's fields, of which one is PROMPT (a text) or MESSAGES, and the line of the file where they begin."""

    number: int
    fields: dict[str, Any]


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark, with `\\n` at the end of each line.

    Raises RequestError for other encodings, OSError for a file that cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16: save it as UTF-8" if data.startswith(_UTF_16_MARKS) else ""
        raise RequestError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}{hint}") from None
    return normalized(text)


def normalized(text: str) -> str:
    """`text` without a byte order mark, with `\\n` at the end of each line."""
    return text.removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def read_prompts(path: str) -> list[PromptLine]:
    """The prompts of a file, by the end of its name in upper or lower case: `.jsonl` and `.ndjson` have an object in
    each line, `.json` an array of objects or texts; each line of any other file is a prompt.

    Raises RequestError, with the number of the line, for what is not a prompt, and OSError for a file that cannot be
    read.
    """
    text, kind = read_text(path), Path(path).suffix.lower()
    if kind == _JSON:
        found = list(_elements(path, text))
    else:
        lines = text.removesuffix("\n").split("\n") if text else []
        found = [(number, _parsed(path, number, line, kind)) for number, line in enumerate(lines, 1)]
    if not found:
        raise RequestError(f"{path} is empty; write prompts into it")
    return [PromptLine(number, _checked(path, number, value)) for number, value in found]


def at_line(path: str, number: int, message: object) -> RequestError:
    """The error that says where `message` applies."""
    return RequestError(f"{path}, line {number}: {message}")


def _parsed(path: str, number: int, line: str, kind: str) -> Any:
    if not line.strip():
        hint = "" if kind in _JSON_LINES else " (a .jsonl file has prompts of several lines)"
        raise at_line(path, number, f"the line is blank; write a prompt into it, or remove it{hint}")
    if kind not in _JSON_LINES:
        return line
    try:
        value, end = _decode(line, len(line) - len(line.lstrip()))
        if line[end:].strip():
            raise RequestError(
                f"not valid JSON: more text from column {end + 1} on; write one object in each line"
            )
    except json.JSONDecodeError as error:
        raise at_line(path, number, f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RequestError as error:
        raise at_line(path, number, error) from None
    if not isinstance(value, dict):
        raise at_line(path, number, f"{_SHAPE} (a JSON array of prompts has a name that ends in .json)")
    return value


def _elements(path: str, text: str) -> Iterator[tuple[int, Any]]:
    """Each element of the array that is the text, with the line where it begins."""
    at = _next(text, 0)
    if not text[at:]:
        return
    if text[at] != "[":
        raise RequestError(
            f"{path} does not begin with [: a .json file holds one array of prompts; a file with an object in each "
            "line has a name that ends in .jsonl"
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
        raise RequestError(f"{path}: there is text after the array; a .json file holds one array of prompts")


def _next(text: str, at: int) -> int:
    """Where the next character is that JSON does not skip."""
    while text[at : at + 1] and text[at] in " \t\n":
        at += 1
    return at


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends. Raises JSONDecodeError, and RequestError for what JSON
    cannot say, or not at this size."""
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
        raise RequestError(f"{number} is beyond the range of a float; the answers could not repeat it")
    return value


def _constant(name: str) -> float:
    raise RequestError(f"{name} is not valid JSON; write null, or a text")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_constant)
_TOO_DEEP = f"arrays and objects are nested more than {MAX_NESTING} deep"
_SHAPE = (
    f'a line must be an object with a text or a chat: {{"{PROMPT}": "..."}} or '
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
    """The fields of one prompt, which can be written as they are."""
    fields = {PROMPT: value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or (PROMPT in fields) == (MESSAGES in fields):
        raise at_line(path, number, _SHAPE)
    if PROMPT in fields and (not isinstance(fields[PROMPT], str) or not fields[PROMPT]):
        raise at_line(path, number, _SHAPE)
    if MESSAGES in fields and not _is_chat(fields[MESSAGES]):
        raise at_line(path, number, f'"{MESSAGES}" must be a list of objects, each with a "role": {_SHAPE}')
    if COMPLETION in fields:
        raise at_line(path, number, f"the field {COMPLETION!r} is where the answer is put; rename it")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise at_line(path, number, f"a text is not valid Unicode: {error.reason}") from None
    return fields


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    )
