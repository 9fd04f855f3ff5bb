"""Checks of the values in a hardware file. Each returns the value in the form that `Hardware` stores, or raises
HardwareError with the name of the field, the value and the valid values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flexgen.errors import HardwareError, cut, did_you_mean, shown
from flexgen.units import parse_bytes

Points = tuple[tuple[float, float], ...]
"""(rows, flop/s) of matrix products, in ascending order of rows."""


def table(
    name: str, given: object, convert: Any, needed: Sequence[str] = (), known: Iterable[str] | None = None
) -> Mapping[Any, Any]:
    """`given` with all values converted. The keys must be in `known`, or any strings if it is None."""
    if not isinstance(given, Mapping):
        raise HardwareError(
            f"{name or 'hardware'} is {shown(given)} ({type(given).__name__}); write a table: {{ key = number }}"
        )
    keys = {str(key): key for key in (given if known is None else known) if isinstance(key, str)}
    _refuse_unknown(name, given, keys)
    if missing := [str(key) for key in needed if key not in given]:
        raise HardwareError(
            f"{name} lacks {', '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}"
        )
    return MappingProxyType({keys[str(k)]: convert(f"{name}.{cut(str(k))}", v) for k, v in given.items()})


def _refuse_unknown(where: str, given: Mapping[Any, Any], known: Iterable[str]) -> None:
    for key in given:
        if not isinstance(key, str) or str(key) not in known:
            inside = f" in {where}" if where else ""
            raise HardwareError(
                f"unknown key {shown(key)}{inside}; known: {cut(', '.join(known), 800)}{did_you_mean(key, known)}"
            )


def number(name: str, value: object) -> float:
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        raise HardwareError(
            f"{name} is a whole number outside the range of a float; it must be at most 1e308"
        ) from None
    raise HardwareError(f"{name} is {shown(value)}; it must be a finite number")


def rate(name: str, value: object) -> float:
    if (given := number(name, value)) <= 0:
        raise HardwareError(f"{name} is {given:g}; a rate must be above 0 (per second)")
    return given


def lost(name: str, value: object) -> float:
    if not 0 <= (share := number(name, value)) < 1:
        raise HardwareError(f"{name} is {share:g}; a lost share must be at least 0 and below 1")
    return share


def seconds(name: str, value: object) -> float:
    if (given := number(name, value)) < 0:
        raise HardwareError(f"{name} is {given:g}; it must be at least 0 seconds")
    return given


def at_least_0(name: str, value: object) -> float:
    if (given := number(name, value)) < 0:
        raise HardwareError(f"{name} is {given:g}; it must be at least 0")
    return given


def nbytes(name: str, value: Any) -> int:
    try:
        count = parse_bytes(value)
    except (ValueError, TypeError) as error:
        raise HardwareError(f"{name}: {error}") from None
    if count < 1:
        raise HardwareError(f"{name} is {shown(count)}; the capacity of a tier must be at least 1 byte")
    return count


def points_or_none(name: str, value: object) -> Points:
    return () if isinstance(value, Sequence) and not value else points(name, value)


def seconds_at(name: str, value: object) -> Points:
    return points(name, value, ("numbers", "seconds of each"), seconds)


def points(
    name: str,
    value: object,
    of: tuple[str, str] = ("rows", "flop/s"),
    figure: Callable[[str, object], float] = rate,
) -> Points:
    at, what = of
    pairs = isinstance(value, Sequence) and all(isinstance(p, Sequence) and len(p) == 2 for p in value)
    if not pairs or not value:
        raise HardwareError(f"{name} is {shown(value)}; write points: [[{at}, {what}], ...]")
    assert isinstance(value, Sequence)
    made = tuple((rate(f"{name} {at}", many), figure(name, found)) for many, found in value)
    if any(a[0] >= b[0] for a, b in zip(made, made[1:], strict=False)):
        given = ", ".join(f"{many:g}" for many, _ in made)
        raise HardwareError(
            f"{name} has points at {at} {cut(given)}; write them in ascending order of {at}, without duplicates"
        )
    return made
