"""A Triton kernel that multiplies groups of rows with matrices of their own: the experts of a mixture.

Only `loading.triton_grouped` imports this module. The matrices may be stored anywhere on the GPU: the kernel reads
their addresses from a table, and the rows of each from another one, so the host does not wait for either. It decodes
encoded weights in registers, as `triton_groupwise` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexgen.kernels.packed import MatrixForm
from flexgen.kernels.triton_groupwise import (
    CODES,
    LEAST_ROWS,
    MOST_ROWS,
    OUT,
    multiply_tile,
    on,
    store_tile,
)

_SCALES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _multiply_groups(
    x, ends, addresses, y, out_size, in_size, groups,
    SCALE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, E4M3: tl.constexpr, BIASED: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    # Each group has its own tiles of ROWS rows. There are as many programs as there can be tiles; the last ones end
    # here.
    g = tl.arange(0, GROUPS)
    end = tl.load(ends + g, mask=g < groups, other=0)
    begin = tl.load(ends + g - 1, mask=(g > 0) & (g < groups), other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    tile = tl.program_id(1)
    if tile < tl.sum(tiles, 0):
        own = (last > tile) & (last - tiles <= tile)
        group = tl.sum(tl.where(own, g, 0), 0)
        first = tl.sum(tl.where(own, begin + (tile - last + tiles) * ROWS, 0), 0)
        m = first + tl.arange(0, ROWS)
        n = tl.program_id(0) * OUT + tl.arange(0, OUT)
        has_row, has_out = m < tl.sum(tl.where(own, end, 0), 0), n < out_size
        values = tl.load(addresses + group)
        scales = tl.load(addresses + groups + group).to(tl.pointer_type(SCALE))
        minimums = tl.load(addresses + 2 * groups + group).to(tl.pointer_type(SCALE))
        bias = tl.load(addresses + 3 * groups + group).to(tl.pointer_type(x.dtype.element_ty))
        if BITS == 0:
            matrix = tl.multiple_of(values, 16).to(tl.pointer_type(x.dtype.element_ty))
        else:
            matrix = tl.multiple_of(values, 16).to(tl.pointer_type(tl.uint8))
        sums = multiply_tile(
            x, m, has_row, n, has_out, matrix, scales, minimums, in_size, GROUP, BITS, E4M3, ROWS, OUT, CODES
        )
        store_tile(sums, bias, y, m, has_row, n, has_out, out_size, BIASED)


def multiply(x: Tensor, ends: Tensor, addresses: Tensor, form: MatrixForm) -> Tensor:
    """x (rows, in) @ the matrix of each row's group, transposed, plus its bias, as (rows, out) in the dtype of x.

    ends: (groups,) int32, the end of each group's rows. addresses: (4, groups) int64, those of the values, scales,
    minimums and biases of `form`. All tensors are contiguous, on one device.
    """
    rows, groups = len(x), len(ends)
    out_size, in_size = form.shape
    y = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    if not rows:
        return y
    at_once = min(max(triton.next_power_of_2(triton.cdiv(rows, groups)), LEAST_ROWS), MOST_ROWS)
    most_tiles = rows // at_once + min(rows, groups)
    with on(x.device):
        _multiply_groups[(triton.cdiv(out_size, OUT), most_tiles)](
            x,
            ends,
            addresses,
            y,
            out_size,
            in_size,
            groups,
            SCALE=_SCALES[form.scale_type],
            GROUP=form.group,
            BITS=form.bits,
            E4M3=form.e4m3,
            BIASED=form.biased,
            GROUPS=triton.next_power_of_2(groups),
            ROWS=at_once,
            OUT=OUT,
            CODES=CODES,
        )
    return y
