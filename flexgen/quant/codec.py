"""The interface of codecs: how tensors are stored in fewer bytes, the arithmetic with them, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.quantized import QuantizedMatrix

ENCODING = 1
"""Changes whenever `encode` of a codec gives other bytes for the same tensor. Offload directories keep encoded
weights; those of another number are written again."""

ALIGNMENT = 64
"""Bytes. Parts of an encoded tensor begin at multiples of it: a cache line, the widest vector."""


class Codec(ABC):
    """Stores a tensor as one run of bytes, so that stores and lanes need not know what is in it.

    Its repr names the files of encoded weights in an offload directory, so it shows all that the bytes depend on.
    """

    name: str

    # Bytes

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether tensors of this shape can be encoded; others are kept as they are."""

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of an encoded tensor."""

    @abstractmethod
    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Where the rows of an encoded matrix are: for each part, where row 0 begins and the bytes of a row.

        Rows of a part follow one another, so that n rows of each part make a matrix of n rows in the same form.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """uint8 (nbytes,) on the device of x, which is finite."""

    @abstractmethod
    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Write the tensor to `out`, contiguous, of the shape that was encoded, rounded to its dtype."""

    @abstractmethod
    def decode_workspace(self, shape: Sequence[int]) -> int:
        """Bytes that decoding a tensor on a GPU takes at most, in addition to the result."""

    # Arithmetic

    @abstractmethod
    def matrix(
        self, encoded: Tensor, shape: Sequence[int], dtype: torch.dtype, decoded: Callable[[], Tensor]
    ) -> QuantizedMatrix:
        """An encoded matrix of `shape` for products and lookups in `dtype`; it views `encoded`.

        `decoded`: see `QuantizedMatrix`.
        """

    @abstractmethod
    def heads(self, head_dim: int) -> HeadFormat:
        """How the KV cache stores a head and computes attention over it. Raises PolicyError where it cannot."""

    # What a plan and a prediction know before anything is computed

    def expected_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        """`QuantizedMatrix.fused_rows` on a machine that has the codec's kernels, which need not be this one."""
        return 0

    def certain_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        """The same on this machine, as far as it is certain before the device computes: what a plan relies on."""
        return 0

    def expected_decoding(self, plain: float, dtype: torch.dtype, on_host: bool) -> float | None:
        """Bytes/s that come out of `decode` on a machine without a measurement.

        `plain`: bytes/s of plain cache in `dtype` that the device attends to, which is how fast it reads its memory;
        `on_host`: the device is the host's cores. None where only a measurement tells.
        """
        return None
