"""Triton kernels for group-wise integers on a GPU: decode a matrix to memory, or multiply few rows without decoding.

Only `loading.triton_kernels` imports this module. Both kernels decode each weight to the value of
`dequantise_in_torch`, rounded to the dtype of the product.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexgen.kernels.packed import Packed

_DECODED = 1024
"""Bytes of codes that a program decodes."""
CODES = 64
"""Bytes of codes per row of W that a program multiplies at a time; a power of two."""
OUT = 32
"""Rows of W per program: enough for large reads, and few enough for many programs."""
LEAST_ROWS, MOST_ROWS = 16, 64
"""The minimum and maximum rows of x per program. Matrix units need at least 16."""


@triton.jit
def _decode(
    values, scales, minimums, out, octets, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    GROUP_OCTETS: tl.constexpr = GROUP * BITS // 8
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < octets
    group = at // GROUP_OCTETS
    codes = tl.load(values + at, mask=valid, other=0)
    scale = tl.load(scales + group, mask=valid, other=0).to(tl.float32)
    minimum = tl.load(minimums + group, mask=valid, other=0).to(tl.float32)
    first = group * GROUP + at % GROUP_OCTETS
    if BITS == 8:
        x = codes.to(tl.float32) * scale + minimum
        tl.store(out + first, x.to(out.dtype.element_ty), mask=valid)
    else:
        low = (codes & 15).to(tl.float32) * scale + minimum
        high = (codes >> 4).to(tl.float32) * scale + minimum
        tl.store(out + first, low.to(out.dtype.element_ty), mask=valid)
        tl.store(out + first + GROUP_OCTETS, high.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _add_product(sums, x, rows, has_row, within, valid, weights):
    """sums (M, N) += x[rows, within] (M, K) @ weights (N, K) transposed."""
    part = tl.load(x + rows[:, None] + within[None, :], mask=has_row[:, None] & valid[None, :], other=0)
    # Weights beyond the end are invalid, but are multiplied by zeros.
    return tl.dot(part, tl.trans(weights.to(part.dtype)), sums, input_precision="ieee")


@triton.jit
def multiply_tile(
    x, m, has_row, n, has_out, values, scales, minimums, in_size,
    GROUP: tl.constexpr, BITS: tl.constexpr, E4M3: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Rows m (ROWS) of x @ rows n (OUT) of the matrix, transposed, in float32. `in_size`: the columns of both.

    BITS is 4 or 8 for codes with a scale and a minimum for each GROUP of a row, or 0 for values in the dtype of x.
    E4M3: codes are floats of 8 bits, and `scales` has one for each row.
    """
    GROUP_OCTETS: tl.constexpr = GROUP * BITS // 8
    rows = m.to(tl.int64) * in_size
    sums = tl.zeros((ROWS, OUT), dtype=tl.float32)
    if BITS == 0:
        for begin in range(0, in_size, CODES):
            at = begin + tl.arange(0, CODES)
            valid = at < in_size
            both = has_out[:, None] & valid[None, :]
            weights = tl.load(values + (n.to(tl.int64) * in_size)[:, None] + at[None, :], mask=both, other=0)
            sums = _add_product(sums, x, rows, has_row, at, valid, weights)
    elif E4M3:
        # A code with its exponent and mantissa in those of a float16 is 2 ** 8 times too small.
        scale = tl.load(scales + n, mask=has_out, other=0).to(tl.float32)[:, None] * 256
        for begin in range(0, in_size, CODES):
            at = begin + tl.arange(0, CODES)
            valid = at < in_size
            both = has_out[:, None] & valid[None, :]
            codes = tl.load(values + (n.to(tl.int64) * in_size)[:, None] + at[None, :], mask=both, other=0)
            wide = codes.to(tl.uint16)
            halves = (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)
            sums = _add_product(sums, x, rows, has_row, at, valid, halves.to(tl.float32) * scale)
    else:
        groups = in_size // GROUP
        octets = groups * GROUP_OCTETS
        code_rows = n.to(tl.int64) * octets
        group_rows = n.to(tl.int64) * groups
        for begin in range(0, octets, CODES):
            at = begin + tl.arange(0, CODES)
            valid = at < octets
            group = at // GROUP_OCTETS
            first = group * GROUP + at % GROUP_OCTETS
            both = has_out[:, None] & valid[None, :]
            codes = tl.load(values + code_rows[:, None] + at[None, :], mask=both, other=0)
            place = group_rows[:, None] + group[None, :]
            scale = tl.load(scales + place, mask=both, other=0).to(tl.float32)
            minimum = tl.load(minimums + place, mask=both, other=0).to(tl.float32)
            if BITS == 8:
                weights = codes.to(tl.float32) * scale + minimum
                sums = _add_product(sums, x, rows, has_row, first, valid, weights)
            else:
                low = (codes & 15).to(tl.float32) * scale + minimum
                sums = _add_product(sums, x, rows, has_row, first, valid, low)
                high = (codes >> 4).to(tl.float32) * scale + minimum
                sums = _add_product(sums, x, rows, has_row, first + GROUP_OCTETS, valid, high)
    return sums


@triton.jit
def store_tile(sums, bias, y, m, has_row, n, has_out, out_size, BIASED: tl.constexpr):
    """Store `sums` (ROWS, OUT), plus `bias`, in rows m and columns n of y."""
    if BIASED:
        sums += tl.load(bias + n, mask=has_out, other=0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * out_size + n[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=has_row[:, None] & has_out[None, :])


@triton.jit(do_not_specialize=["num_rows"])  # batches of any size share one kernel
def _multiply(
    x, values, scales, minimums, bias, y, num_rows, out_size, in_size,
    GROUP: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    has_row, has_out = m < num_rows, n < out_size
    sums = multiply_tile(
        x, m, has_row, n, has_out, values, scales, minimums, in_size, GROUP, BITS, False, ROWS, OUT, CODES
    )
    store_tile(sums, bias, y, m, has_row, n, has_out, out_size, BIASED)


def dequantise(packed: Packed, out: Tensor) -> Tensor:
    """Fill `out`, which is contiguous and has the shape of `packed`, and return it."""
    octets = packed.values.numel()
    if octets:
        with on(out.device):
            _decode[(triton.cdiv(octets, _DECODED),)](
                packed.values,
                packed.scales,
                packed.minimums,
                out,
                octets,
                GROUP=packed.group,
                BITS=packed.bits,
                BLOCK=_DECODED,
            )
    return out


def try_out(device: torch.device) -> None:
    """Decode one group on `device`. Raises Triton's error if it cannot compile or launch the kernel."""
    values = torch.zeros(1, 32, dtype=torch.uint8, device=device)
    scales = torch.zeros(1, 1, dtype=torch.float16, device=device)
    dequantise(
        Packed(values, scales, scales, bits=4, group=64),
        torch.empty(1, 64, dtype=torch.float16, device=device),
    )


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ packed (out, in) transposed + bias (out), in the dtype of x, with sums in float32."""
    x = x.contiguous()
    out_size, in_size = packed.shape
    num_rows = x.numel() // in_size
    y = torch.empty(*x.shape[:-1], out_size, dtype=x.dtype, device=x.device)
    rows = min(max(triton.next_power_of_2(num_rows), LEAST_ROWS), MOST_ROWS)
    with on(x.device):
        _multiply[(triton.cdiv(out_size, OUT), triton.cdiv(num_rows, rows))](
            x,
            packed.values,
            packed.scales,
            packed.minimums,
            x if bias is None else bias,  # not read if there is no bias
            y,
            num_rows,
            out_size,
            in_size,
            GROUP=packed.group,
            BITS=packed.bits,
            BIASED=bias is not None,
            ROWS=rows,
            OUT=OUT,
            CODES=CODES,
        )
    return y


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context that makes `device` the current GPU, on which Triton launches. Triton's interpreter needs none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
