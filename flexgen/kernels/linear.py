"""`linear` and `embedding` with plain, oneDNN-prepacked or quantised weights.

`half_linear` multiplies half types on the CPU if that is faster. For other products of bfloat16, oneDNN converts a
weight to its own layout in every product, unless `prelayout` has converted it once. That makes products of few rows
1.3 to 2 times faster (benchmarks/host_linear.py), and those of many rows slightly faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels import half_linear
from flexgen.kernels.quantized import QuantizedMatrix

_LAYOUT_ROWS = 32
"""The rows of x for which oneDNN chooses the layout. The result is correct for any number of rows, and the speed
depends little on it."""


def has_prelayout(dtype: torch.dtype) -> bool:
    """Whether `prelayout` helps matrices of this dtype: bfloat16, if oneDNN multiplies few rows of it fastest."""
    return (
        dtype is torch.bfloat16
        and half_linear.has_products(dtype)
        and half_linear.native_rows(dtype) < _LAYOUT_ROWS
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def prelayout(weight: Tensor) -> Tensor:
    """A copy of the weight (out, in) in oneDNN's own layout, which only `linear` can use."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)


def linear(x: Tensor, weight: Tensor | QuantizedMatrix, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out).

    The weight may be a tensor, the `prelayout` of one, or a codec's matrix. The latter is decoded only if x has more
    rows than `QuantizedMatrix.fused_rows`.
    """
    if not isinstance(weight, Tensor):
        if x.numel() <= weight.fused_rows(x.dtype) * x.shape[-1]:
            return weight.multiply(x, bias)
        weight = weight.decoded()
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if product := half_linear.fastest(x, weight):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


def linears(
    x: Tensor, weights: Sequence[Tensor | QuantizedMatrix], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`linear` of x with several matrices of the same kind.

    If the compiled kernel multiplies all of them fastest, one call does. x is converted once, and the threads do not
    wait for each other after each product.
    """
    encoded = [w for w in weights if not isinstance(w, Tensor)]
    plain = [w for w in weights if isinstance(w, Tensor) and not w.is_mkldnn]
    few = all(x.numel() <= matrix.fused_rows(x.dtype) * x.shape[-1] for matrix in encoded)
    if len(encoded) == len(weights) and few:
        return encoded[0].multiply_all(x, encoded, biases)
    natively = all(half_linear.fastest(x, w) is half_linear.multiply_natively for w in plain)
    if len(plain) == len(weights) and natively:
        return half_linear.multiply_all_natively(x, plain, biases)
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def embedding(ids: Tensor, weight: Tensor | QuantizedMatrix) -> Tensor:
    """Rows `ids` (any shape) of a table (rows, n), as (*ids.shape, n). A codec decodes only these rows."""
    return F.embedding(ids, weight) if isinstance(weight, Tensor) else weight.gather(ids)
