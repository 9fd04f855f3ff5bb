"""Elementwise operations of a layer: the product with a SiLU gate, and the residual connection.

On a CPU, they are compiled calls, which a tape can record (`kernels.tape`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native

_TYPES = torch.bfloat16, torch.float16
"""In float32, the exponential of the kernel could differ from that of torch in the last bit."""


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for tensors of the same shape and strides, contiguous. It may overwrite gate."""
    if (
        gate.device.type == "cpu"
        and gate.dtype in _TYPES
        and gate.numel()
        and _by_rows(gate, up)
        and announce()
    ):
        return silu_product_natively(gate, up)
    return silu_product_in_torch(gate, up)


def _by_rows(gate: Tensor, up: Tensor) -> bool:
    """Whether both consist of rows at equal distances, as the halves of a contiguous tensor do."""
    strides = gate.stride()
    if strides != up.stride() or strides[-1] != 1 or gate.dtype is not up.dtype:
        return False
    shape = gate.shape
    return all(strides[n] == strides[n + 1] * shape[n + 1] for n in range(len(shape) - 2))


def silu_product_natively(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_product` with the compiled kernel."""
    size = gate.shape[-1]
    y = gate if gate.is_contiguous() else torch.empty(gate.shape, dtype=gate.dtype)
    stride = gate.stride(-2) if gate.dim() > 1 else size
    native.silu_product(
        NUMBERS[gate.dtype],
        (gate.numel() // size, size),
        gate.data_ptr(),
        up.data_ptr(),
        stride,
        y.data_ptr(),
        stride if y is gate else size,
        torch.get_num_threads(),
    )
    return y


def silu_product_in_torch(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_product` in torch, on every device."""
    gate = F.silu(gate, inplace=True)
    return gate.mul_(up) if gate.is_contiguous() else gate * up


def add_(out: Tensor, x: Tensor) -> Tensor:
    """Add x to out, in place. Returns out."""
    same = out.shape == x.shape and out.dtype is x.dtype
    fits = same and out.device.type == "cpu" and out.dtype in NUMBERS and out.numel()
    if fits and out.is_contiguous() and x.is_contiguous() and announce():
        threads = torch.get_num_threads()
        native.add(NUMBERS[out.dtype], out.numel(), out.data_ptr(), x.data_ptr(), threads)
        return out
    return out.add_(x)
