"""The capacity limits of a machine's tiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen.errors import RequestError, shown
from flexgen.policy import Tier
from flexgen.units import parse_bytes


class Limits(dict[Tier, int | None]):
    """The capacity of each tier in bytes, or None for no limit.

    host: the common capacity of the GPU and CPU tiers if both are host memory, otherwise None.
    """

    host: int | None = None


def read_limits(given: Any) -> dict[Tier, int]:
    """Bytes by tier from the argument `max_memory` of a caller. None means no limits.

    Raises RequestError if it is not a mapping, if a key is not a tier, and if a value is not a size.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(
            f"max_memory is {shown(given)}; write a dict such as {{'gpu': '10GiB', 'cpu': '64GiB'}}"
        )
    limits = {}
    for key, size in given.items():
        if key not in list(Tier):
            raise RequestError(f"max_memory has the key {shown(key)}; keys must be {', '.join(Tier)}")
        try:
            limits[Tier(key)] = parse_bytes(size)
        except ValueError as error:
            raise RequestError(f"max_memory[{str(key)!r}]: {error}") from None
    return limits
