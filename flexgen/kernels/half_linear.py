"""Products in bfloat16 and float16 on a CPU that has no instructions for them.

On such a CPU, these types only save storage and bandwidth. Libraries multiply them at a fraction of the rate of
float32. So this module widens them to float32: few rows with the compiled kernel, which keeps widened values in
registers and caches, and many rows in pieces for a library's float32 product (benchmarks/host_linear.py). Sums are in
float32 and rounded once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native, native_available
from flexgen.units import MIB, align

_NATIVE_ROWS = 256
"""The maximum rows of x for which the compiled kernel is at least as fast as the library."""
ROWS = 1024
"""Rows of x that are widened at once."""
PIECE_BYTES = 4 * MIB
"""Bytes in float32 of a piece of the matrix that is widened at once. It stays in a cache until it is multiplied."""
_TILE_ROWS, _TILE_DEPTH, _TILE_GAPS = 4, 1024, 16
"""The same as in cpp/tiles.h: x is stored in whole tiles of rows, with `_TILE_GAPS` floats after each
`_TILE_DEPTH`."""


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in this type."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype is torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def native_rows(dtype: torch.dtype) -> int:
    """The maximum rows of x for which the compiled kernel multiplies a half type fastest; 0 without the kernel."""
    return 0 if has_products(dtype) or not native_available() else _NATIVE_ROWS


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` is the faster product of x and a plain matrix."""
    return x.device.type == "cpu" and weight.dtype is x.dtype and not has_products(x.dtype)


def workspace_bytes(rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
    """The maximum bytes that `multiply` allocates in addition to its result; 0 if `multiply` is not needed."""
    if has_products(dtype):
        return 0
    if rows <= _NATIVE_ROWS and native_available():
        width = in_size + _TILE_GAPS * (in_size // _TILE_DEPTH + 2)
        return torch.float32.itemsize * align(rows, _TILE_ROWS) * width
    return pieces_bytes(rows, out_size, in_size)


def pieces_bytes(
    rows: int, out_size: int, in_size: int, rows_at_once: int = ROWS, piece_bytes: int = PIECE_BYTES
) -> int:
    """Bytes that `multiply_in_pieces` takes in addition to its result."""
    rows, at_once = min(rows, rows_at_once), _at_once(out_size, in_size, piece_bytes)
    return torch.float32.itemsize * (rows * in_size + at_once * (in_size + rows) + out_size)


def _at_once(out_size: int, in_size: int, piece_bytes: int) -> int:
    """Rows of the matrix that are widened at once."""
    return min(max(piece_bytes // (torch.float32.itemsize * in_size), 1), out_size)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out), all in the same half type on the CPU."""
    few = x.numel() <= _NATIVE_ROWS * x.shape[-1]
    if few and x.numel() and weight.is_contiguous() and announce():
        return multiply_natively(x, weight, bias)
    return multiply_in_pieces(x, weight, bias)


def multiply_natively(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`multiply` with the compiled kernel. It reads each weight once for several rows of x and does not write it."""
    x = x.contiguous()
    out_size, in_size = weight.shape
    y = torch.empty(*x.shape[:-1], out_size, dtype=x.dtype)
    native.packed_linear(
        NUMBERS[x.dtype],
        NUMBERS[weight.dtype],
        16,
        (x.numel() // in_size, out_size, in_size, in_size),
        x.data_ptr(),
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        weight.data_ptr(),
        0,
        0,
        False,
        torch.get_num_threads(),
    )
    return y


def multiply_in_pieces(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows_at_once: int = ROWS,
    piece_bytes: int = PIECE_BYTES,
) -> Tensor:
    """Products in float32 of `rows_at_once` rows of x with `piece_bytes` of the widened matrix at a time."""
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
