"""The description of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """An RMS norm or a layer norm over the last dimension."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    plus: float = 0.0
    """A number that is added to the stored weight."""
    cast: Literal["before", "after"] = "before"
    """When an RMS norm rounds to the model's dtype: before or after the product with the weight. A layer norm always
    rounds after it."""
