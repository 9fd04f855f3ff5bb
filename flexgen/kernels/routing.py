"""The choices of a mixture's router, and the sum of the chosen experts' outputs.

Products of all experts need the choices in the order of their experts. In torch, a router takes a dozen operations on
a few numbers. On a CPU, compiled calls do their work for few tokens, and a tape can record them (`kernels.tape`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native

ROWS = 64
"""The most tokens that the compiled calls route: they use one thread."""


class RouterForm(NamedTuple):
    """How a router chooses `top_k` experts, and the factors of their outputs.

    sigmoid: the scores are sigmoids of logits instead of a softmax. scores_all: all logits are scored before the
    choice, instead of those of the chosen experts. normalised: factors are divided by their sum, or by `least_sum` if
    this is larger. scale: the factor of all factors.
    """

    top_k: int
    sigmoid: bool = False
    scores_all: bool = True
    normalised: bool = False
    least_sum: float = 0.0
    scale: float = 1.0


class Routed(NamedTuple):
    """The choices of all tokens, in the order of their experts.

    tokens (choices,) int64 and factors (choices,) float32: the token of each choice and the factor of its output.
    places (tokens, top_k) int64: where each choice of a token is. ends (experts,) int32: where those of each expert
    end.
    """

    tokens: Tensor
    factors: Tensor
    places: Tensor
    ends: Tensor


def routes_natively(logits: Tensor) -> bool:
    """Whether `route_natively` accepts logits (tokens, experts)."""
    few = logits.device.type == "cpu" and 0 < len(logits) <= ROWS
    return few and logits.dtype in NUMBERS and logits.is_contiguous() and announce()


def route_natively(logits: Tensor, correction: Tensor | None, form: RouterForm) -> Routed:
    """The choices for logits (tokens, experts), with the compiled kernel.

    correction: (experts,) float32, added to each score for the choice, but not for the factor.
    """
    rows, experts = logits.shape
    choices = rows * form.top_k
    routed = Routed(
        torch.empty(choices, dtype=torch.int64),
        torch.empty(choices, dtype=torch.float32),
        torch.empty(rows, form.top_k, dtype=torch.int64),
        torch.empty(experts, dtype=torch.int32),
    )
    native.route(
        NUMBERS[logits.dtype],
        (rows, experts, form.top_k),
        logits.data_ptr(),
        0 if correction is None else correction.data_ptr(),
        (form.sigmoid, form.scores_all, form.normalised, form.least_sum, form.scale),
        *(part.data_ptr() for part in routed),
    )
    return routed


def by_expert(chosen: Tensor, factors: Tensor, experts: int) -> Routed:
    """The choices (tokens, top_k) of experts, with their factors, in torch, on every device."""
    sorted_experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=chosen.device)
    ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return Routed(order // chosen.shape[1], factors.flatten()[order], places.view(chosen.shape), ends)


def expert_sum(x: Tensor, routed: Routed, dtype: torch.dtype) -> Tensor:
    """The sums (tokens, size) of the outputs x (choices, size) of each token's experts, times their factors.

    They are computed in float32, in the order of each token's choices. dtype: that of the result, float32 or the
    dtype of x.
    """
    if x.device.type != "cpu" or x.dtype not in NUMBERS or not x.is_contiguous() or not announce():
        return expert_sum_in_torch(x, routed, dtype)
    rows, top_k = routed.places.shape
    y = x.new_empty(rows, x.shape[1], dtype=dtype)
    native.sum_experts(
        NUMBERS[x.dtype],
        dtype is torch.float32,
        (rows, top_k, x.shape[1]),
        x.data_ptr(),
        routed.factors.data_ptr(),
        routed.places.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def expert_sum_in_torch(x: Tensor, routed: Routed, dtype: torch.dtype) -> Tensor:
    """`expert_sum` in torch, on every device."""
    return (x * routed.factors[:, None])[routed.places].sum(dim=1).to(dtype)
