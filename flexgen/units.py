"""Parsing and formatting of bytes and seconds for people."""

from __future__ import annotations

import re

from flexgen.errors import shown

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

BLOCK = 4096
"""In bytes. Direct disk I/O needs file offset, length and memory address to be multiples of it."""

ALIGNMENT = 256
"""In bytes. Tensors in a buffer begin at multiples of it, like those of CUDA's own allocator."""

MOST_BYTES = (1 << 63) - 1
"""The largest size that system calls and torch accept."""

LARGEST_COUNT = (1 << 31) - 1
"""The maximum number of prompts, batches or tokens. The product of two counts is below 2**63."""

_SCALES = {
    "": 1, "B": 1,
    "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def parse_bytes(text: str | int | float) -> int:
    """Parse a size such as "10GiB", "1.5 GB", "4096" or a number, in bytes. Raises ValueError for anything else."""
    if isinstance(text, bool):
        raise ValueError(f"{shown(text)} is not a size: write a number of bytes or a text such as '10GiB'")
    if isinstance(text, int | float):
        if not 0 <= text < float("inf"):
            raise ValueError(f"{shown(text)} is not a size: it must be a finite number >= 0")
        if text > MOST_BYTES:
            raise _too_large(text)
        return int(text)
    match = (
        re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text) if isinstance(text, str) else None
    )
    if not match or match[2].upper() not in _SCALES:
        raise ValueError(f"{shown(text)} is not a size: write a number of bytes or a text such as '10GiB'")
    count = float(match[1]) * _SCALES[match[2].upper()]
    if count > MOST_BYTES:
        raise _too_large(text)
    return int(count)


def _too_large(given: object) -> ValueError:
    return ValueError(f"{shown(given)} is not a size: it must be below 8 EiB (2**63 bytes)")


def format_bytes(count: int | float) -> str:
    """Format bytes with three significant digits and a binary unit: `1536 -> "1.5 KiB"`.

    Counts too large for a float are written as a power of two.
    """
    if isinstance(count, int) and count.bit_length() > 1000:
        return f"{'-' if count < 0 else ''}2**{count.bit_length() - 41} TiB"
    value, sign = abs(float(count)), "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{_three_digits(value)} {unit}"
        value /= 1024
    return f"{sign}{_three_digits(value)} TiB"


def _three_digits(value: float) -> str:
    # `.3g` writes an exponent from 1000 on, and binary units go up to 1023.
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """Format seconds: `0.0123 -> "12.3 ms"`, `75 -> "1 min 15 s"`."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:  # larger values round to a whole second
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def align(count: int, to: int) -> int:
    """The smallest multiple of `to` that is >= `count`."""
    return -(-count // to) * to
