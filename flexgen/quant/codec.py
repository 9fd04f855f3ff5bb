"""The interface of codecs: storage of tensors in fewer bytes, arithmetic with them, and its cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.quantized import QuantizedMatrix

ENCODING = 1
"""Increase it whenever `encode` of a codec returns other bytes for the same tensor. Weights that an offload directory
stores under another number are encoded again."""

ALIGNMENT = 64
"""Bytes. Parts of an encoded tensor begin at multiples of it: a cache line, the widest vector."""


Encoded = TypeVar("Encoded", contravariant=True)


class MatrixCodec(ABC, Generic[Encoded]):
    """Decodes tensors and multiplies with them in their encoded form. `Encoded` is the type of that form."""

    name: str

    @abstractmethod
    def decode(self, encoded: Encoded, out: Tensor) -> None:
        """Write the tensor to `out`, which is contiguous and of the encoded shape, rounded to the dtype of `out`."""

    @abstractmethod
    def decode_workspace(self, shape: Sequence[int]) -> int:
        """The maximum memory that decoding a tensor on a GPU allocates, in addition to the result, in bytes."""

    @abstractmethod
    def matrix(
        self, encoded: Encoded, shape: Sequence[int], dtype: torch.dtype, decoded: Callable[[], Tensor]
    ) -> QuantizedMatrix:
        """An encoded matrix of `shape` for products and lookups in `dtype`; it views `encoded`.

        `decoded`: see `QuantizedMatrix`.
        """

    # For plans and predictions, before anything is computed

    def expected_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        """`QuantizedMatrix.fused_rows` on a machine that has the codec's kernels; it may be another machine."""
        return 0

    def certain_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        """`fused_rows` on this machine if it is certain before the device computes, else 0. Plans rely on it."""
        return 0

    def expected_decoding(self, plain: float, dtype: torch.dtype, on_host: bool) -> float | None:
        """Output bytes/s of `decode` on a machine without a measurement, or None if it must be measured.

        plain: bytes/s of unencoded cache in `dtype` over which the device computes attention, which is the speed at
        which it reads its memory. on_host: the device is the host's cores.
        """
        return None

    def expected_product(self, rows: float, on_host: bool) -> float | None:
        """The time of a fused product of `rows` rows with one value of the matrix, if it was not measured.

        It is in bytes that the device reads from memory in this time. None: the product takes the time to read the
        encoded matrix, or that of the flops of a product with a plain one.
        """
        return None


class Codec(MatrixCodec[Tensor]):
    """Encodes a tensor as one run of bytes, so that stores and lanes do not depend on its contents.

    Its repr is part of the file names of encoded weights in an offload directory, so it must show everything that the
    bytes depend on.
    """

    searched: bool = True
    """Whether a search for a policy may choose the codec. Otherwise it is used only where a policy names it."""

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether tensors of this shape can be encoded; others are stored unchanged."""

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of an encoded tensor."""

    @abstractmethod
    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The rows of an encoded matrix: for each part, the offset of row 0 and the size of a row, in bytes.

        The rows of a part are contiguous, so n rows of each part are a matrix of n rows in the same encoding.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode x, whose values are finite, as uint8 (nbytes,) on the same device."""

    @abstractmethod
    def heads(self, head_dim: int) -> HeadFormat:
        """How the KV cache stores a head and computes attention over it.

        Raises PolicyError if the codec cannot store heads of this size.
        """
