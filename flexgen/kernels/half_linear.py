"""Products in bfloat16 and float16 on a CPU that has no instructions for them.

The types are then a way to keep and to move numbers. A library multiplies them at a fraction of float32's rate, so
here they are widened: by the compiled kernel, which keeps what it widens in registers and caches, or for many rows
piece by piece for a library's product in float32 (benchmarks/host_linear.py). Sums are in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native, native_available
from flexgen.units import MIB, align

_NATIVE_ROWS = 256
"""Rows of x up to which the compiled kernel is at least as fast as the library."""
ROWS = 1024
"""Rows of x that are widened at once."""
PIECE_BYTES = 4 * MIB
"""Bytes of the matrix that are widened at once, in float32: they stay in a cache between being written and read."""
_TILE_ROWS, _TILE_DEPTH, _TILE_GAPS = 4, 1024, 16
"""As in cpp/tiles.h: x is laid out for whole tiles of rows, with some floats between each so many of its values."""


def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in this type."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype is torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` is the better product of x and a plain matrix."""
    return x.device.type == "cpu" and weight.dtype is x.dtype and not has_products(x.dtype)


def workspace_bytes(rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
    """Most bytes that `multiply` takes in addition to its result; 0 where it is not needed."""
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
    """x (..., in) @ weight (out, in) transposed + bias (out), all in one half type on the CPU."""
    few = x.numel() <= _NATIVE_ROWS * x.shape[-1]
    if few and x.numel() and weight.is_contiguous() and announce():
        return multiply_natively(x, weight, bias)
    return multiply_in_pieces(x, weight, bias)


def multiply_natively(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The compiled kernel: each weight is read once for some rows of x, and never written widened."""
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
    # Taken once: a fresh tensor for each piece would be megabytes of pages that the system clears anew.
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
