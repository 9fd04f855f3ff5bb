"""What the tiers of a machine can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen.errors import RequestError, shown
from flexgen.policy import Tier
from flexgen.units import parse_bytes


class Limits(dict[Tier, int | None]):
    """Bytes that each tier can hold, None for no limit.

    host: bytes that the GPU and CPU tiers can hold together where both are host memory, None where they are not.
    """

    host: int | None = None


def read_limits(given: Any) -> dict[Tier, int]:
    """Bytes by tier from what a caller gives as `max_memory`; None limits nothing.

    Raises RequestError for what is not a mapping, keys that are not tiers and values that are not sizes.
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
            raise RequestError(f"max_memory has the key {shown(key)}; it takes {', '.join(Tier)}")
        try:
            limits[Tier(key)] = parse_bytes(size)
        except ValueError as error:
            raise RequestError(f"max_memory[{str(key)!r}]: {error}") from None
    return limits
