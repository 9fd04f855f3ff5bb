"""Conversion of accelerate's `max_memory` to a device and limits by tier."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping

import torch

from flexgen.errors import RequestError
from flexgen.policy import Tier
from flexgen.units import parse_bytes


def read_max_memory(
    given: Mapping[int | str, int | str] | None, device: str = "auto"
) -> tuple[str, dict[Tier, int] | None]:
    """The compute device and bytes by tier, from a dict such as `{0: "10GiB", "cpu": "64GiB", "disk": "1TB"}`.

    A number is a GPU. With device="auto", the device is the GPU with a limit above 0, or the CPU if there is none.
    Another `device` is not changed. On a machine without a GPU, the limit of a GPU is ignored. None and an empty dict
    set no limits.

    Raises RequestError for other keys, for a GPU that is not the compute device, and for invalid sizes.
    """
    if given is None:
        return device, None
    if not isinstance(given, Mapping):
        raise RequestError(
            f"max_memory is {reprlib.repr(given)}; write a dict such as {{0: '10GiB', 'cpu': '64GiB'}}"
        )
    if not given:
        return device, None
    limits: dict[Tier, int] = {}
    gpus: dict[int, int] = {}
    for key, size in given.items():
        try:
            count = _bytes(size)
        except (TypeError, ValueError) as error:
            raise RequestError(f"max_memory[{reprlib.repr(key)}]: {error}") from None
        if key in ("cpu", "disk"):
            limits[Tier(key)] = count
        else:
            gpus[_gpu_number(key)] = count
    named = [number for number, count in gpus.items() if count]
    if device == "auto" and not named:
        return "cpu", limits
    if device == "auto":
        in_use = named[0]
        device = f"cuda:{in_use}" if torch.cuda.is_available() else "cpu"
    else:
        number = re.search(r"\d+", device.partition(",")[0]) if device.startswith("cuda") else None
        in_use = int(number[0]) if number else 0
    if device != "cpu" and (others := set(named) - {in_use}):
        raise RequestError(
            f"max_memory has GPU {', '.join(map(str, sorted(others)))}; flexgen computes on one GPU, here on "
            f"{in_use}: leave the others out, or choose the GPU with device="
        )
    if in_use in gpus:
        limits[Tier.GPU] = gpus[in_use]
    return device, limits


def _gpu_number(key: object) -> int:
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    if isinstance(key, str) and (number := re.fullmatch(r"cuda:(\d{1,4})", key, re.ASCII)):
        return int(number[1])
    raise RequestError(
        f"max_memory has the key {reprlib.repr(key)}; it must be the number of a GPU, 'cpu' or 'disk'"
    )


def _bytes(size: int | str) -> int:
    """Parse a size like accelerate, where a lower-case b means bits: "8Gb" is one gigabyte."""
    bits = isinstance(size, str) and re.search("[kKmMgG]b$", size.strip()) is not None
    if not isinstance(size, str | int | float):
        raise TypeError(
            f"a {type(size).__name__} is not a size: write a number of bytes or a text such as '10GiB'"
        )
    return parse_bytes(size) // (8 if bits else 1)
