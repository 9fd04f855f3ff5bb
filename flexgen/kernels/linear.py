"""Linear layers on a CPU with weights laid out for its matrix products.

oneDNN lays a weight out anew in every product unless that was done before. Done once, bfloat16 products of few
rows are 1.3 to 2 times faster (benchmarks/host_linear.py), and those of many rows a little.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 32
"""Rows of x that the layout is chosen for; the choice matters little, and every number of rows is right."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether `pack` helps matrices of this dtype: bfloat16, where oneDNN multiplies it."""
    return (
        dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's own layout, a copy that only `linear` can use."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out); the weight may be packed."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
