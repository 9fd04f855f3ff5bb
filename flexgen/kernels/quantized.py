"""Matrices in the form of a codec: what `linear` and `embedding` need to know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class QuantizedMatrix(ABC):
    """A matrix (out, in) as a codec stores it: `linear` and `embedding` take it in place of a tensor.

    `decoded()` gives it as a tensor in `dtype`, for products of many rows. It is called for each such product: a
    caller that makes this object keeps the result for as many products as it can.
    """

    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the matrix as it is stored."""

    @abstractmethod
    def gather(self, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape) as (*ids.shape, in) in `dtype`; only these rows are decoded."""

    def fused_rows(self, dtype: torch.dtype) -> int:
        """Most rows of an x in `dtype` for which `multiply` is faster than a product with the decoded matrix.

        0 where it never is: `linear` then always decodes.
        """
        return 0

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) @ matrix transposed + bias (out), without a decoded matrix where there is a kernel for that."""
        return F.linear(x, self.decoded(), bias)
