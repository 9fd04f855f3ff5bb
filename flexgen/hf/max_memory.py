"""accelerate's `max_memory`: which tier each of its keys means."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flexgen.errors import RequestError
from flexgen.policy import Tier
from flexgen.units import parse_bytes


def read_max_memory(
    given: Mapping[int | str, int | str] | None, device: str = "auto"
) -> dict[Tier, int] | None:
    """Bytes by tier from `{0: "10GiB", "cpu": "64GiB", "disk": "1TB"}`.

    A number is that of a GPU, the one that `device` ("cuda:1", the first one otherwise) computes on; without a GPU
    its limit is of no account. Raises RequestError for other keys, another GPU's number, and what is no size.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestError(f"max_memory is {given!r}; write a dict such as {{0: '10GiB', 'cpu': '64GiB'}}")
    in_use = re.search(r"\d+", device.partition(",")[0]) if device.startswith("cuda") else None
    gpu = int(in_use[0]) if in_use else 0
    tiers: dict[int | str, Tier] = {
        gpu: Tier.GPU,
        f"cuda:{gpu}": Tier.GPU,
        "cpu": Tier.CPU,
        "disk": Tier.DISK,
    }
    limits = {}
    for key, size in given.items():
        if isinstance(key, bool) or key not in tiers:
            raise RequestError(
                f"max_memory has the key {key!r}; flexgen computes on one device and knows {gpu} (its GPU), 'cpu' "
                "and 'disk'"
            )
        try:
            limits[tiers[key]] = parse_bytes(size)
        except (TypeError, ValueError) as error:
            raise RequestError(f"max_memory[{key!r}]: {error}") from None
    return limits
