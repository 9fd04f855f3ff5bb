"""Linear layers and embeddings, whatever form their matrix is kept in.

Half types that the CPU has no products for are widened (`half_linear`). Where it has them, oneDNN lays a weight
out in every product unless that was done before: its prelayout. Done once, bfloat16 products of few rows are 1.3 to 2
times faster (benchmarks/host_linear.py), and those of many rows a little.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels import half_linear
from flexgen.kernels.quantized import QuantizedMatrix

_ROWS = 32
"""Rows of x that the layout is chosen for; the choice matters little, and every number of rows is right."""


def has_prelayout(dtype: torch.dtype) -> bool:
    """Whether `prelayout` helps matrices of this dtype: bfloat16, where the CPU and oneDNN multiply it."""
    return (
        dtype is torch.bfloat16
        and half_linear.has_products(dtype)
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def prelayout(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's own layout, a copy that only `linear` can use."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)


def linear(x: Tensor, weight: Tensor | QuantizedMatrix, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out).

    The weight may be a tensor, the `prelayout` of one, or the matrix of a codec, which is decoded only where x has
    more rows than `QuantizedMatrix.fused_rows`.
    """
    if isinstance(weight, QuantizedMatrix):
        if x.numel() <= weight.fused_rows(x.dtype) * x.shape[-1]:
            return weight.multiply(x, bias)
        weight = weight.decoded()
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if half_linear.widens(x, weight):
        return half_linear.multiply(x, weight, bias)
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor | QuantizedMatrix) -> Tensor:
    """Rows `ids` (any shape) of a table (rows, n), as (*ids.shape, n). A codec decodes only these."""
    if isinstance(weight, QuantizedMatrix):
        return weight.gather(ids)
    return F.embedding(ids, weight)
