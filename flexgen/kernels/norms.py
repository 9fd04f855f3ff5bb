"""RMS norms. In torch, a norm on a CPU takes seven operations and float32 copies of x, which the compiled kernel
avoids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native, native_available
from flexgen.kernels.results import empty_result


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, plus: float = 0.0, round_first: bool = True
) -> Tensor:
    """x (..., size) / sqrt(mean(x**2) + eps) * (weight (size) + plus), in the dtype of x, computed in float32.

    round_first: round both factors to the dtype of x before the product with the weight. A GPU always rounds only the
    result, except with `plus`. Without a weight, `plus` has no effect.
    """
    if x.is_cuda and (weight is None or not plus):  # one launch
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    fits = weight is None or (weight.dtype is x.dtype and weight.is_contiguous())
    if x.device.type == "cpu" and x.dtype in NUMBERS and x.numel() and fits and announce():
        return rms_norm_natively(x, weight, eps, plus, round_first)
    return rms_norm_in_torch(x, weight, eps, plus, round_first)


def host_workspace_bytes(rows: int, size: int, dtype: torch.dtype) -> int:
    """Temporary bytes of `rms_norm` for contiguous x (rows, size) on a CPU, in addition to the result."""
    return 0 if native_available() and dtype in NUMBERS else torch_workspace_bytes(rows, size)


def torch_workspace_bytes(rows: int, size: int) -> int:
    """The same for the version in torch: two copies of x, the mean and the factor of each row, and the weight and its
    sum with `plus`, all in float32."""
    return (2 * rows * size + 2 * rows + 2 * size) * torch.float32.itemsize


def rms_norm_natively(x: Tensor, weight: Tensor | None, eps: float, plus: float, round_first: bool) -> Tensor:
    """`rms_norm` with the compiled kernel, for a weight in the dtype of x."""
    x = x.contiguous()
    size = x.shape[-1]
    y = empty_result(x.shape, x.dtype)
    native.rms_norm(
        NUMBERS[x.dtype],
        round_first,
        (x.numel() // size, size),
        x.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        y.data_ptr(),
        eps,
        plus,
        torch.get_num_threads(),
    )
    return y


def rms_norm_in_torch(x: Tensor, weight: Tensor | None, eps: float, plus: float, round_first: bool) -> Tensor:
    """`rms_norm` in torch, on every device."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if not round_first:
        return normed.mul_(weight.float() + plus).to(x.dtype)
    return normed.to(x.dtype).mul_(weight + plus if plus else weight)
