"""A cell as the runtime computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexgen.layout.cache import Span


@dataclass(frozen=True, slots=True, eq=False)
class BoundCell:
    token: int
    layer: int
    batch: int
    slot: int
    span: Span
    padding: Any
