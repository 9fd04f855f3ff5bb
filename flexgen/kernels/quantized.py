"""The interface of encoded matrices for `linear` and `embedding`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.packed import StoredMatrix

EVERY_ROW = 1 << 30
"""`QuantizedMatrix.fused_rows` if the fused product is faster for any number of rows."""


class QuantizedMatrix(ABC):
    """A matrix (out, in) that a codec has encoded. `linear` and `embedding` accept it in place of a tensor.

    `decoded()` returns it as a tensor in `dtype`, for products with many rows. Each such product calls it, so the
    creator of this object should cache the result.
    """

    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the encoded matrix."""

    @abstractmethod
    def gather(self, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape) as (*ids.shape, in) in `dtype`. Decodes only these rows."""

    @property
    def stored(self) -> StoredMatrix | None:
        """The matrix as kernels for groups of matrices read it; None if they do not know its form."""
        return None

    def fused_rows(self, dtype: torch.dtype) -> int:
        """The maximum rows of an x in `dtype` for which `multiply` is faster than a product with the decoded matrix.

        If it is 0, `linear` always decodes the matrix.
        """
        return 0

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) @ matrix transposed + bias (out). Does not decode the matrix if there is a fused kernel."""
        return F.linear(x, self.decoded(), bias)

    def multiply_all(
        self, x: Tensor, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """`multiply` of x with each of `matrices`, of which this one is the first."""
        return [matrix.multiply(x, bias) for matrix, bias in zip(matrices, biases, strict=True)]
