"""Products with encoded matrices of group-wise integers, and lookups of their rows.

A product of few rows is bound by the reads of the weights. Encoded weights have a quarter (int4) or half (int8) of
the bytes of a 16-bit matrix, and a decoded matrix must also be written and read. A product of many rows is
compute-bound, and a library's product with the decoded matrix is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.groupwise import check_packed, dequantise
from flexgen.kernels.loading import NUMBERS, announce, native, triton_kernels
from flexgen.kernels.packed import Packed
from flexgen.kernels.quantized import QuantizedMatrix

_HOST_ROWS = {torch.bfloat16: 16, torch.float16: 64, torch.float32: 16}
_GPU_ROWS = 64


@dataclass(frozen=True)
class GroupwiseMatrix(QuantizedMatrix):
    """A matrix (out, in) of group-wise integers."""

    packed: Packed
    dtype: torch.dtype
    decoded: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.packed.values, self.packed.scales, self.packed.minimums))

    def fused_rows(self, dtype: torch.dtype) -> int:
        return fused_rows(self.packed, dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(x, self.packed, bias)

    def gather(self, ids: Tensor) -> Tensor:
        return gather(self.packed, ids, self.dtype)


def fused_rows(packed: Packed, dtype: torch.dtype) -> int:
    """The maximum rows of an x in `dtype` for which the fused product is faster; 0 if there is no kernel.

    The number applies to one product, regardless of how many products could share a decoded matrix. With more rows,
    decoding pays off. With fewer rows, even a product with a matrix that is already decoded takes longer than the
    fused one (`benchmarks/packed_linear.py`).
    """
    device = packed.values.device
    if device.type == "cpu":
        return _HOST_ROWS.get(dtype, 0) if announce() else 0
    return _GPU_ROWS if triton_kernels(device) and dtype in NUMBERS else 0


def expected_fused_rows(on_host: bool, dtype: torch.dtype) -> int:
    """`fused_rows` on a machine that has the kernels; it may be another machine."""
    if on_host:
        return _HOST_ROWS.get(dtype, 0)
    return _GPU_ROWS if dtype in NUMBERS else 0


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ packed (out, in) transposed + bias (out), in the dtype of x, with sums in float32."""
    check_packed(packed)
    if len(packed.shape) != 2 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., in) for {tuple(packed.shape)}")
    out_size = packed.shape[0]
    if bias is not None and (bias.shape, bias.dtype) != ((out_size,), x.dtype):
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} and type {bias.dtype}: expected {(out_size,)} and {x.dtype}"
        )
    parts = (packed.values, packed.scales, packed.minimums, *(() if bias is None else (bias,)))
    if any(part.device != x.device for part in parts):
        raise ValueError(f"x is on {x.device}, but the matrix or the bias is on another device")
    if not x.numel() or x.dtype not in NUMBERS or not all(part.is_contiguous() for part in parts):
        return multiply_in_torch(x, packed, bias)
    if x.device.type == "cpu" and announce():
        return multiply_natively(x, packed, bias)
    if kernels := triton_kernels(x.device):
        return kernels.multiply(x, packed, bias)
    return multiply_in_torch(x, packed, bias)


def multiply_natively(
    x: Tensor, packed: Packed, bias: Tensor | None = None, rounded: bool = False
) -> Tensor:
    """`multiply` with the compiled kernel. It decodes each weight once for several rows of x and does not write
    it."""
    x = x.contiguous()
    out_size, in_size = packed.shape
    y = torch.empty(*x.shape[:-1], out_size, dtype=x.dtype)
    native.packed_linear(
        NUMBERS[x.dtype],
        NUMBERS[packed.scales.dtype],
        packed.bits,
        (x.numel() // in_size, out_size, in_size, packed.group),
        x.data_ptr(),
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        packed.values.data_ptr(),
        packed.scales.data_ptr(),
        packed.minimums.data_ptr(),
        rounded,
        torch.get_num_threads(),
    )
    return y


def multiply_in_torch(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`multiply` in torch, on every device: decodes the matrix to new memory, then multiplies."""
    return F.linear(x, dequantise(packed, torch.empty(packed.shape, dtype=x.dtype, device=x.device)), bias)


def gather(packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (any shape) of a matrix (rows, n), as (*ids.shape, n) in `dtype`. Decodes only these rows."""
    taken = ids.flatten()
    found = replace(
        packed,
        values=packed.values.index_select(0, taken),
        scales=packed.scales.index_select(0, taken),
        minimums=packed.minimums.index_select(0, taken),
    )
    return dequantise(found, torch.empty(found.shape, dtype=dtype, device=ids.device)).unflatten(0, ids.shape)
