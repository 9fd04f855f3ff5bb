"""Rotary positions. On a CPU, one compiled call does the work of a dozen small operations.

`rotate_token` rotates the queries and keys of one token per row, whose factors are the same in all layers.
`rotate_tokens` rotates the heads of any number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native

_TYPES = torch.bfloat16, torch.float16
"""A kernel for float32 could round differently from the rotation in torch."""


def token_factors(cos: Tensor, sin: Tensor) -> Tensor:
    """The factors of `rotate_token`, (batch * seq, 4, 1, n), from `rope_tables` of `seq` positions per row."""
    cos, sin = (x.flatten(0, 2)[:, None, None] for x in (cos, sin))
    return torch.cat((cos, cos, -sin, sin), dim=1)


def rotate_token(q: Tensor, k: Tensor, factors: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate q (batch, heads, 1, head_dim) and k (batch, kv_heads, 1, head_dim) by `token_factors`.

    It returns both, and may overwrite the arguments. The pairs of a head are (j, j + n), or (2j, 2j + 1) if they are
    `interleaved`.
    """
    fits = not interleaved and q.dtype in _TYPES and q.device.type == "cpu" and q.dtype is factors.dtype
    if fits and _by_rows(q) and _by_rows(k) and factors.is_contiguous() and announce():
        return rotate_natively(q, k, factors)
    return rotate_in_torch(q, k, factors, interleaved)


def _by_rows(x: Tensor) -> bool:
    """Whether the heads of each row are stored one after another."""
    return x.stride(3) == 1 and (x.stride(1) == x.shape[3] or x.shape[1] == 1)


def rotate_natively(q: Tensor, k: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate_token` in place, with the compiled kernel."""
    rows, heads, _, head_dim = q.shape
    native.rotate(
        NUMBERS[q.dtype],
        (rows, heads, k.shape[1], head_dim, factors.shape[3]),
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        factors.data_ptr(),
        torch.get_num_threads(),
    )
    return q, k


def rotates_tokens(x: Tensor, cos: Tensor) -> bool:
    """Whether `rotate_tokens` accepts these tensors: heads by token, as projections return them, on the CPU."""
    if x.device.type != "cpu" or x.dtype not in _TYPES or x.dtype is not cos.dtype or not x.numel():
        return False
    batch, heads, seq, head_dim = x.shape
    by_token = x.stride(3) == 1 and (heads == 1 or x.stride(1) == head_dim)
    in_order = batch == 1 or x.stride(0) == seq * x.stride(2)
    return by_token and in_order and cos.shape[:3] == (batch, 1, seq) and announce()


def rotate_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (batch, heads, seq, head_dim) by cos and sin (batch, 1, seq, n), in place. Returns x.

    The pairs of a head are (j, j + n). Each result is equal to that of torch.
    """
    batch, heads, seq, head_dim = x.shape
    factors = torch.stack((cos, cos, -sin, sin), dim=3)  # (batch, 1, seq, 4, n): those of each token together
    sizes = batch * seq, heads, 0, head_dim, cos.shape[3]  # no keys: x is everything
    stride, threads = x.stride(2), torch.get_num_threads()
    native.rotate(
        NUMBERS[x.dtype], sizes, x.data_ptr(), stride, x.data_ptr(), stride, factors.data_ptr(), threads
    )
    return x


def rotate_in_torch(
    q: Tensor, k: Tensor, factors: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rotate_token` in torch, on every device: three launches, or five if only a part of each head is rotated.

    It does not overwrite q and k.
    """
    batch, heads, _, head_dim = q.shape
    half = factors.shape[-1]
    partial = 2 * half < head_dim
    (q1, q2), (k1, k2) = (pairs_of(x[..., : 2 * half] if partial else x, interleaved) for x in (q, k))
    parts = torch.cat((q1, k1, q2, k2, q2, k2, q1, k1), dim=1).view(batch, 4, -1, half)
    parts.mul_(factors)
    products, others = parts.chunk(2, dim=1)
    if interleaved:
        out = parts.new_empty(batch, parts.shape[2], half, 2)
        torch.add(products, others, out=out.permute(0, 3, 1, 2))
    else:
        out = parts.new_empty(batch, parts.shape[2], 2, half)
        torch.add(products, others, out=out.transpose(1, 2))
    rotated = out.view(batch, -1, 1, 2 * half)
    if partial:
        rest = torch.cat((q[..., 2 * half :], k[..., 2 * half :]), dim=1)
        rotated = torch.cat((rotated, rest), dim=-1)
    return rotated.narrow(1, 0, heads), rotated.narrow(1, heads, rotated.shape[1] - heads)


def pairs_of(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second values of the rotary pairs."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
