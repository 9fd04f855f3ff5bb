"""Products in bfloat16 and float16 on a CPU.

For few rows, the compiled kernel is the fastest (benchmarks/host_linear.py). It reads the matrix where it is stored,
so a tied head and streamed weights are as fast as others. With instructions for products of bfloat16, it is the
fastest for many rows too (benchmarks/packed_linear.py). Without instructions for a type, the type only saves storage
and bandwidth: the kernel widens values to float32 in registers and caches. That is faster than the float32 product of
a library with widened pieces of the matrix, except for many rows without AVX2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgen.kernels.loading import HALVES, NUMBERS, announce, native, native_available
from flexgen.kernels.operands import operand_bytes
from flexgen.kernels.quantized import EVERY_ROW
from flexgen.kernels.results import empty_result
from flexgen.units import MIB

_BASELINE_ROWS = 256
"""The maximum rows of x for which the compiled kernel widens without AVX2. It is not measured."""
_ROWS_BESIDE_AMX = 8
"""The same if the CPU has instructions for tiles of the type (AMX). It is not measured: reading the matrix limits so
few rows."""
ROWS = 1024
"""Rows of x that are widened at once."""
PIECE_BYTES = 4 * MIB
"""Bytes in float32 of a piece of the matrix that is widened at once. It stays in a cache until it is multiplied."""


def _has_tiles(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for tiles of this type."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_amx_tile_supported()
    return dtype is torch.float16 and torch.cpu._is_amx_fp16_supported()


def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in this type."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or _has_tiles(dtype)
    return dtype is not torch.float16 or _has_tiles(dtype)


def native_rows(dtype: torch.dtype) -> int:
    """The maximum rows of x for which the compiled kernel multiplies a half type fastest; 0 without the kernel."""
    return _rows(dtype) if dtype in HALVES and native_available() else 0


def _rows(dtype: torch.dtype) -> int:
    if _has_tiles(dtype):
        return _ROWS_BESIDE_AMX
    if dtype is torch.bfloat16 and native.variant() == "avx512_bf16":
        return EVERY_ROW
    if has_products(dtype):
        return 0
    return _BASELINE_ROWS if native.variant() == "baseline" else EVERY_ROW


def fastest(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The function for the fastest product of x and a plain matrix, or None if it is the library's own product."""
    dtype = x.dtype
    if dtype not in HALVES or weight.dtype is not dtype or x.device.type != "cpu":
        return None
    few = announce() and 0 < x.numel() <= _rows(dtype) * x.shape[-1]
    if few and weight.is_contiguous():
        return multiply_natively
    return None if has_products(dtype) else multiply_in_pieces


def workspace_bytes(rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
    """The maximum bytes that a product allocates in addition to its result; 0 if it is the library's."""
    if rows <= native_rows(dtype):
        paired = dtype is torch.bfloat16 and has_products(dtype)
        return operand_bytes(rows, in_size, dtype.itemsize if paired else torch.float32.itemsize)
    return 0 if has_products(dtype) else pieces_bytes(rows, out_size, in_size)


def pieces_bytes(
    rows: int, out_size: int, in_size: int, rows_at_once: int = ROWS, piece_bytes: int = PIECE_BYTES
) -> int:
    """Bytes that `multiply_in_pieces` takes in addition to its result."""
    rows, at_once = min(rows, rows_at_once), _at_once(out_size, in_size, piece_bytes)
    return torch.float32.itemsize * (rows * in_size + at_once * (in_size + rows) + out_size)


def _at_once(out_size: int, in_size: int, piece_bytes: int) -> int:
    """Rows of the matrix that are widened at once."""
    return min(max(piece_bytes // (torch.float32.itemsize * in_size), 1), out_size)


def multiply_natively(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out), all in the same half type, with the compiled kernel.

    It reads each weight once for several rows of x and does not write it.
    """
    return multiply_all_natively(x, [weight], [bias])[0]


def multiply_all_natively(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`multiply_natively` of x with several matrices in one call."""
    in_size = x.shape[-1]
    x = x.contiguous()
    ys = [empty_result((*x.shape[:-1], len(weight)), x.dtype) for weight in weights]
    native.packed_linear(
        NUMBERS[x.dtype],
        NUMBERS[x.dtype],
        16,
        (x.numel() // in_size, in_size, in_size),
        x.data_ptr(),
        [
            (len(weight), y.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.data_ptr(), 0, 0)
            for weight, bias, y in zip(weights, biases, ys, strict=True)
        ],
        False,
        None,
        torch.get_num_threads(),
    )
    return ys


def multiply_in_pieces(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows_at_once: int = ROWS,
    piece_bytes: int = PIECE_BYTES,
) -> Tensor:
    """The same in torch: float32 products of `rows_at_once` rows of x and `piece_bytes` of the widened matrix."""
    out_size, in_size = weight.shape
    flat = x.reshape(-1, in_size)
    y = torch.empty(len(flat), out_size, dtype=x.dtype)
    most, at_once = min(len(flat), rows_at_once), _at_once(out_size, in_size, piece_bytes)
    # Allocated once: for a new tensor per piece, the system would clear megabytes of pages each time.
    wide_x, wide, product = (
        torch.empty(most, in_size),
        torch.empty(at_once, in_size),
        torch.empty(most * at_once),
    )
    wide_bias = None if bias is None else bias.float()
    for some, result in zip(flat.split(rows_at_once), y.split(rows_at_once), strict=True):
        rows = wide_x[: len(some)].copy_(some)
        for begin in range(0, out_size, at_once):
            end = min(begin + at_once, out_size)
            piece = wide[: end - begin].copy_(weight[begin:end])
            part = product[: len(some) * len(piece)].view(len(some), len(piece))
            if wide_bias is None:
                torch.mm(rows, piece.t(), out=part)
            else:
                torch.addmm(wide_bias[begin:end], rows, piece.t(), out=part)
            result[:, begin:end] = part
    return y.view(*x.shape[:-1], out_size)
