"""Chooses token ids from logits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from flexgen.errors import RequestError, shown
from flexgen.kernels.largest import NO_INDEX, largest
from flexgen.kernels.result_memory import RESULT_MEMORY
from flexgen.kernels.workspaces import choice_rows
from flexgen.runtime.draws import MAX_SEED
from flexgen.runtime.request import check_whole

INVALID = NO_INDEX
"""Replaces the id of a row with NaN or infinite scores, for which no id can be chosen.

Ids are copied to host memory anyway, so this check does not wait for a GPU.
"""
_UNITS = 2.0**52
"""The units of probability per 1 in which `draw` counts. Their sum is below 2**53, which float64 represents
exactly."""


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise RequestError for invalid values."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise RequestError(f"{name} is {shown(value)}; it must be a number")
        try:
            float(value)
        except OverflowError:
            raise RequestError(f"{name} exceeds the range of a float; it must be finite") from None
    if not 0 <= temperature < math.inf:  # NaN fails too
        raise RequestError(
            f"temperature is {shown(temperature)}; it must be finite and >= 0 (0 chooses the best token)"
        )
    check_whole("top_k", top_k, 0)
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p is {shown(top_p)}; it must be above 0 and at most 1 (1 keeps all)")


def check_seed(seed: int | None) -> None:
    """Raise RequestError unless `seed` is None or a whole number of 64 bits."""
    if seed is not None:
        check_whole("seed", seed, 0, MAX_SEED)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Token ids (batch,) int64 for logits (batch, vocab).

    temperature: divides the logits. 0 takes the largest logit and ignores the other arguments.
    top_k: keep the k largest logits, and ties with the k-th. 0 keeps all.
    top_p: keep the most probable tokens, each while the sum of the probabilities before it is below `top_p`. The most
        probable token is always kept. 1 keeps all.
    generator: the source of the random numbers; None is torch's global generator.
    uniforms: (batch,) float64 numbers in [0, 1), in place of the generator's.

    The id is `INVALID` for a row with a NaN, and for a row with infinity if an id is drawn.

    Raises RequestError for a negative or NaN temperature, a negative top_k, and top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return largest(logits)
    if uniforms is None:
        uniforms = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=generator)
    options = float(temperature), top_k, top_p
    return _in_parts(lambda some, shares: _draw_filtered(some, shares, *options), logits, uniforms)


def draw_by_scores(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (batch,) int64 that `draw` draws from the softmax of scores (batch, vocab), in float32."""
    return _in_parts(lambda some, shares: draw(some.softmax(dim=-1), shares), scores, uniforms)


def _in_parts(choose: Callable[[Tensor, Tensor], Tensor], scores: Tensor, uniforms: Tensor) -> Tensor:
    """`choose(scores, uniforms)` for a few rows at a time, so that it allocates at most `choice_bytes`."""
    RESULT_MEMORY.return_unused()
    at_once = choice_rows(scores.shape[-1])
    if len(scores) <= at_once:
        return choose(scores, uniforms)
    parts = zip(scores.split(at_once), uniforms.split(at_once), strict=True)
    return torch.cat([choose(some, shares) for some, shares in parts])


def _draw_filtered(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    scaled = _divided(logits, temperature)
    best: Tensor | None = None
    if 0 < top_k < scaled.shape[-1]:
        best = scaled.topk(top_k, dim=-1).values
        scaled.masked_fill_(scaled < best[:, -1:], -math.inf)
    if top_p < 1:
        if best is None:
            best = scaled.sort(dim=-1, descending=True).values
        _keep_mass(scaled, best, top_p)
    return draw(torch.softmax(scaled, dim=-1, out=scaled), uniforms)


def _keep_mass(scaled: Tensor, best: Tensor, top_p: float) -> None:
    """Remove the tokens that top-p does not keep from `scaled` (batch, vocab). Values of kept tokens do not change.

    best (batch, n): the largest values of each row, in decreasing order. The others are -inf or equal to the last of
    these. The largest value of each row is 0, from `_divided`.
    """
    mass = best.exp().div_(_total(scaled))
    kept = mass.cumsum(dim=-1).sub_(mass) < top_p
    kept[:, 0] = True  # no mass is before it; rounding of the sum must not remove it
    least = best.masked_fill(~kept, math.inf).amin(dim=-1, keepdim=True)
    # If tokens tie with the smallest kept one, those with the lowest ids are kept, while the mass before them allows.
    greater = mass.masked_fill(best <= least, 0.0).sum(dim=-1, keepdim=True)
    each = mass.masked_fill(best != least, 0.0).amax(dim=-1, keepdim=True)
    allowed = ((top_p - greater) / each).ceil_().clamp_min_(1.0)
    ties = scaled == least
    excess = ties.cumsum(dim=-1, dtype=torch.int32) > allowed
    scaled.masked_fill_((scaled < least).logical_or_(ties.logical_and_(excess)), -math.inf)


def _total(scaled: Tensor) -> Tensor:
    """The sums (batch, 1) of the exponentials of each row."""
    return scaled.exp().sum(dim=-1, keepdim=True)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids (batch,) int64 from probabilities (batch, vocab) with `uniforms` (batch,), float64 in [0, 1).

    The id is the first one up to which the probabilities sum to more than that share of the total. Ids with
    probability 0 are never drawn, and probabilities below 2**-52 count as 0. The id is `INVALID` for a row of NaN:
    the softmax of a row with a NaN or +inf, or with only -inf, consists of NaN.
    """
    valid = ~probabilities[:, 0].isnan()
    # Sums of integers are the same on every device in any order of addition, and the sums never decrease.
    parts = probabilities.to(torch.float64, copy=True).nan_to_num_(nan=1.0).mul_(_UNITS).long()
    sums = torch.cumsum(parts, dim=-1, out=parts)
    # It is below the last sum: float64 represents both exactly, and uniforms are at most 1 - 2**-53.
    chosen = (uniforms * sums[:, -1]).long()
    ids = torch.searchsorted(sums, chosen[:, None], right=True).squeeze(-1)
    return torch.where(valid, ids, INVALID)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """A copy of logits / temperature in float32, minus the largest of each row, so that no temperature overflows."""
    logits = logits.to(torch.float32, copy=True)
    smallest = torch.finfo(logits.dtype).tiny  # a smaller temperature would be 0 in this dtype
    return logits.sub_(logits.max(dim=-1, keepdim=True).values).div_(max(temperature, smallest))
