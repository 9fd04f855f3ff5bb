"""Invalid sizes and keys in `max_memory`."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.errors import RequestError
from flexgen.hf.max_memory import read_max_memory


def nested(depth: int = 100_000) -> tuple[Any, ...]:
    made: tuple[Any, ...] = ()
    for _ in range(depth):
        made = (made,)
    return made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cpu": "9" * 400}, r"max_memory\['cpu'\]: .* is not a size: it must be below 8 EiB"),
        ({"cpu": 10**400}, "it must be below 8 EiB"),
        ({"cpu": "1e999GiB"}, "not a size"),
        ({"cpu": float("nan")}, "not a size"),
        ({"cpu": float("inf")}, "not a size"),
        ({"cpu": True}, "not a size"),
        ({"cpu": {}}, "a dict is not a size"),
        ({0: ["1GiB"]}, r"max_memory\[0\]: a list is not a size"),
        ({"cuda:" + "9" * 5000: 1}, "has the key 'cuda:9"),
        ({(0, 1): 1}, r"has the key \(0, 1\)"),
        ({None: 1}, "has the key None"),
        (7, "max_memory is 7; write a dict"),
    ],
    ids=range(12),
)
def test_an_invalid_size_or_device_is_a_request_error(given: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_max_memory(given, "cpu")


def test_deep_values_are_a_request_error() -> None:
    deep = nested()
    with pytest.raises(RequestError, match="a tuple is not a size"):
        read_max_memory({"cpu": deep}, "cpu")  # type: ignore[dict-item]
    with pytest.raises(RequestError, match="write a dict"):
        read_max_memory(deep, "cpu")  # type: ignore[arg-type]
