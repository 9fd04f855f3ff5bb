"""Attention over a part of the tokens, and the exact merge of several parts.

A part is normalised by the exponentials of its own scores. The log of their sum says how much the part weighs against
the others, so attention over all tokens is the mean of the parts with these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from flexgen.kernels.loading import NUMBERS, announce, native

_FLASH_ALIGNMENT = 8
"""The size of a head in FlashAttention on a GPU is a multiple of this number of values."""


class Partial(NamedTuple):
    """Attention over a part of the tokens.

    values (rows, heads, new, head_dim) float32: the attention if there were no other tokens. lse (rows, heads, new)
    float32: the log of the sum of the exponentials of the scores. Zero and -inf for a query that attends to no token.
    """

    values: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial], dtype: torch.dtype) -> Tensor:
    """Attention over the tokens of all parts, (rows, heads, new, head_dim) in `dtype`. No token is in two parts.

    At most one part has the layer's sinks. A query that attends to no token results in zero.
    """
    values = parts[0].values
    if values.device.type == "cpu" and dtype in NUMBERS and values.numel() and announce():
        return merge_natively(parts, dtype)
    return merge_in_torch(parts, dtype)


def merge_natively(parts: Sequence[Partial], dtype: torch.dtype) -> Tensor:
    """`merge` with the compiled kernel. The result is stored by token, so that merging the heads is a view."""
    rows, heads, new, head_dim = parts[0].values.shape
    out = torch.empty(rows, new, heads, head_dim, dtype=dtype)
    parts = [Partial(_adjacent(part.values), part.lse.contiguous()) for part in parts]
    native.merge_parts(
        NUMBERS[dtype],
        (rows, heads, new, head_dim),
        out.data_ptr(),
        [(part.values.data_ptr(), part.lse.data_ptr(), part.values.stride()[:3]) for part in parts],
        torch.get_num_threads(),
    )
    return out.transpose(1, 2)


def _adjacent(x: Tensor) -> Tensor:
    """x with adjacent values of a head."""
    return x if x.stride(-1) == 1 else x.contiguous()


def merge_in_torch(parts: Sequence[Partial], dtype: torch.dtype) -> Tensor:
    """`merge` in torch, on every device."""
    values, lse = parts[0]
    for n, part in enumerate(parts[1:], 2):
        # NaN is the difference of two -inf. NaN in a part is also in its values, and stays.
        weight = torch.sigmoid(part.lse - lse).nan_to_num_(0.0)
        values = torch.lerp(values, part.values, weight.unsqueeze(-1))
        if n < len(parts):
            lse = torch.logaddexp(lse, part.lse)
    return values.to(dtype)


def flash_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> Partial | None:
    """Plain attention with torch's fused kernels, which do not store the scores; q, k and v (rows, heads, tokens,
    head_dim) have equal numbers of heads.

    mask: 0 or -inf in the dtype of q, if not `causal`; each query attends to a token. Returns None if no fused kernel
    with a log-sum-exp supports the device, dtype and shape, or the mask.
    """
    if q.device.type == "cpu":
        values, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return Partial(values.float(), lse.float())
    if not q.is_cuda or mask is not None or q.shape[-1] % _FLASH_ALIGNMENT:
        return None
    if not can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, causal, False)):
        return None
    values, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return Partial(values.float(), lse)
