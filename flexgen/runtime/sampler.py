"""From logits to token ids."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from flexgen.errors import RequestError
from flexgen.runtime.draws import MAX_SEED
from flexgen.runtime.request import check_whole

INVALID = -1
"""In the place of an id: the row has NaN or infinite scores, so that none can be chosen.

Ids come to host memory anyway, so that this check costs no wait for a GPU.
"""
_UNITS = 2.0**52
"""Of probability, in which `draw` counts. Their sum is below 2**53, so float64 holds it exactly."""


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise RequestError for values that cannot be meant."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise RequestError(f"{name} is {value!r}; it must be a number")
        try:
            float(value)
        except OverflowError:
            raise RequestError(f"{name} is beyond the range of a float; it must be finite") from None
    if not 0 <= temperature < math.inf:  # NaN fails too
        raise RequestError(
            f"temperature is {temperature}; it must be finite and >= 0 (0 takes the best token)"
        )
    check_whole("top_k", top_k, 0)
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p is {top_p}; it must be above 0 and at most 1 (1 keeps all)")


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

    Temperature 0 is argmax, and no filter runs. Otherwise, in this order: logits / temperature; top-k keeps
    the k largest, and what ties with the k-th; top-p keeps a token while the mass strictly before it, by
    falling probability, is below `top_p` (so the best one always); then `draw` with `uniforms`, which come from
    `generator` (torch's global one if None) where they are not given. `INVALID` for a row that has a NaN, and for
    one that has infinity where a draw is made.

    Raises RequestError for a negative or NaN temperature, a negative top_k, top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return best(logits)
    if uniforms is None:
        uniforms = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=generator)
    scaled = _divided(logits.float(), float(temperature))
    if 0 < top_k < scaled.shape[-1]:
        kth = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kth, -math.inf)
    if top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(dim=-1)
        before = mass.cumsum(dim=-1) - mass
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        # The best token has nothing before it; rounding of the sum must not take it away.
        ordered[..., 0] = scaled.max(dim=-1).values
        scaled = torch.full_like(scaled, -math.inf).scatter_(-1, order, ordered)
    return draw(scaled.softmax(dim=-1), uniforms)


def best(scores: Tensor) -> Tensor:
    """Ids (batch,) int64 of the largest of each row of scores (batch, vocab); `INVALID` for a row that has a NaN."""
    ids = scores.argmax(dim=-1)  # NaN counts as the largest
    return torch.where(scores.gather(-1, ids[:, None]).squeeze(-1).isnan(), INVALID, ids)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (batch,) int64 drawn from probabilities (batch, vocab), of which `uniforms` (batch,), float64 in [0, 1),
    choose: the first id up to which the probabilities sum to more than that share of the whole.

    An id of probability 0 is never drawn, and one below 2**-52 is taken for that. `INVALID` for a row that is NaN:
    the softmax of a row that has one NaN or +inf, or nothing but -inf, is NaN throughout.
    """
    valid = ~probabilities[:, 0].isnan()
    # Whole numbers sum to the same on every device, in whatever order it adds, and the sums never fall.
    parts = probabilities.to(torch.float64, copy=True).nan_to_num_(nan=1.0).mul_(_UNITS)
    sums = parts.long().cumsum_(dim=-1)
    # Below the last sum: float64 holds both exactly, and uniforms end at 1 - 2**-53.
    chosen = (uniforms * sums[:, -1]).long()
    ids = torch.searchsorted(sums, chosen[:, None], right=True).squeeze(-1)
    return torch.where(valid, ids, INVALID)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, less the largest of each row: so it does not overflow, whatever the temperature is."""
    smallest = torch.finfo(logits.dtype).tiny  # below it, a temperature would be 0 in this type
    return (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, smallest)
