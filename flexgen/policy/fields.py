"""Checks and conversions of the fields of a policy. Their errors name the field, the value and a valid one."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, overload

from flexgen.errors import PolicyError, did_you_mean, shown
from flexgen.units import LARGEST_COUNT

Given = TypeVar("Given")
Held = TypeVar("Held")


class Converted(Generic[Given, Held]):
    """A dataclass field that accepts a short form (20, {"gpu": 20}) and stores the full form."""

    def __init__(self, convert: Callable[[Given], Held], default: Held) -> None:
        self.convert = convert
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Held: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Held: ...
    def __get__(self, instance: object | None, owner: type) -> Held:
        if instance is None:
            return self.default
        held: Held = instance.__dict__[self.name]
        return held

    def __set__(self, instance: object, given: Given) -> None:
        try:
            instance.__dict__[self.name] = self.convert(given)
        except PolicyError as error:
            raise PolicyError(f"{self.name}: {error}") from None


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = [str(name) for name in known]
    for key in given:
        if key not in known:
            raise PolicyError(
                f"unknown key {shown(key)}; known: {', '.join(known)}{did_you_mean(key, known)}"
            )


def percentage(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PolicyError(
            f"{shown(value)} ({type(value).__name__}) is not a percentage; write a number from 0 to 100"
        )
    percent = _float(value)
    if not 0 <= percent <= 100:  # NaN fails this too
        raise PolicyError(f"{percent:g} percent is outside 0 to 100; write 20 for a fifth")
    return percent + 0.0  # -0.0 becomes 0.0


def _float(value: Any) -> float:
    """The value as a float; infinite if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole_number(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise PolicyError(
            f"{name} is {shown(value)} ({type(value).__name__}); it must be a whole number >= {least}"
        )
    if value < least:
        raise PolicyError(f"{name} is {shown(value)}; it must be at least {least}")
    if (count := operator.index(value)) > LARGEST_COUNT:
        raise PolicyError(f"{name} is {shown(count)}; it must be at most {LARGEST_COUNT}")
    return count


def fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PolicyError(
            f"{name} is {shown(value)} ({type(value).__name__}); it must be a number above 0, at most 1"
        )
    if not 0 < (share := _float(value)) <= 1:  # NaN fails this too
        raise PolicyError(f"{name} is {share:g}; it must be above 0 and at most 1; write 0.1 for a tenth")
    return share
