"""Group-wise integers as a codec: FlexGen's own compression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.errors import PolicyError
from flexgen.kernels.groupwise import decode_workspace, dequantise, quantise
from flexgen.kernels.groupwise_linear import GroupwiseMatrix, expected_fused_rows, host_fused_rows
from flexgen.kernels.heads import GroupwiseHeads, HeadFormat
from flexgen.kernels.loading import native_available
from flexgen.kernels.packed import Packed
from flexgen.kernels.quantized import EVERY_ROW, QuantizedMatrix
from flexgen.quant.codec import ALIGNMENT, Codec
from flexgen.units import align


@dataclass(frozen=True)
class Groupwise(Codec):
    """Integers of `bits` bits, with a float16 scale and minimum for each `group` values of a row.

    Rows are along the last dimension, over which a linear layer sums (FlexGen, arXiv 2303.06865, section 4.2). With
    4 bits and groups of 64, a value takes 4.5 bits.
    """

    name: str
    bits: int
    group: int = 64

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and shape[-1] % self.group == 0

    def nbytes(self, shape: Sequence[int]) -> int:
        return self._parts(shape)[-1]

    def decode_workspace(self, shape: Sequence[int]) -> int:
        return decode_workspace(math.prod(shape), self.bits, self.group)

    def rows(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        scales, minimums, _ = self._parts(shape)
        per_group = shape[-1] // self.group * torch.float16.itemsize
        return (0, shape[-1] * self.bits // 8), (scales, per_group), (minimums, per_group)

    def encode(self, x: Tensor) -> Tensor:
        packed = quantise(x, self.bits, self.group)
        encoded = torch.zeros(self.nbytes(x.shape), dtype=torch.uint8, device=x.device)
        view = self._packed(encoded, x.shape)
        view.values.copy_(packed.values)
        view.scales.copy_(packed.scales)
        view.minimums.copy_(packed.minimums)
        return encoded

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        dequantise(self._packed(encoded, out.shape), out)

    def matrix(
        self, encoded: Tensor, shape: Sequence[int], dtype: torch.dtype, decoded: Callable[[], Tensor]
    ) -> QuantizedMatrix:
        return GroupwiseMatrix(self._packed(encoded, shape), dtype, decoded)

    def heads(self, head_dim: int) -> HeadFormat:
        """Groups of `group` values if they divide the head; otherwise the head is one group."""
        if head_dim * self.bits % 8:
            raise PolicyError(
                f"cache: codec {self.name!r} stores heads of an even size, but this model has heads of {head_dim}; "
                "use no codec for the cache"
            )
        return GroupwiseHeads(head_dim, self.bits, head_dim if head_dim % self.group else self.group)

    def expected_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        return expected_fused_rows(on_host, dtype)

    def certain_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        # The kernels of a GPU are known only once it has computed.
        return host_fused_rows(dtype, self.group) if on_host and native_available() else 0

    def _parts(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Offsets in bytes of the scales, the minimums and the end of the tensor; the values come first."""
        count = math.prod(shape)
        per_group = align(count // self.group * torch.float16.itemsize, ALIGNMENT)
        scales = align(count * self.bits // 8, ALIGNMENT)
        return scales, scales + per_group, scales + 2 * per_group

    def _packed(self, encoded: Tensor, shape: Sequence[int]) -> Packed:
        *outer, last = shape
        scales, minimums, _ = self._parts(shape)
        groups = (*outer, last // self.group)
        count = math.prod(groups) * torch.float16.itemsize
        values = math.prod(shape) * self.bits // 8
        return Packed(
            values=encoded[:values].view(*outer, last * self.bits // 8),
            scales=encoded[scales : scales + count].view(torch.float16).view(groups),
            minimums=encoded[minimums : minimums + count].view(torch.float16).view(groups),
            bits=self.bits,
            group=self.group,
        )


@dataclass(frozen=True)
class RoundedGroupwise(Groupwise):
    """`Groupwise`, with products on a CPU that round the activations to int8 in groups of `group` values.

    This changes results, so it has its own name in policies. Tensors are stored as in `Groupwise`. On a GPU, products
    are those of `Groupwise`.
    """

    searched = False

    def matrix(
        self, encoded: Tensor, shape: Sequence[int], dtype: torch.dtype, decoded: Callable[[], Tensor]
    ) -> QuantizedMatrix:
        return GroupwiseMatrix(self._packed(encoded, shape), dtype, decoded, rounded=True)

    def expected_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        return EVERY_ROW if on_host else super().expected_fused_rows(on_host, dtype)

    def certain_fused_rows(self, on_host: bool, dtype: torch.dtype) -> int:
        # Without the compiled kernels too: `multiply_rounded` never takes the decoded matrix of a visit.
        return EVERY_ROW if on_host else 0
