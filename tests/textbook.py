"""Attention by its definition in float64, one pair of query and key at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen.kernels.scoring import Scoring


def sees(scoring: Scoring, query: int, key: int, start: int) -> bool:
    """Whether the query at one position attends to the key at another, in a row whose first token is at `start`."""
    if not start <= key <= query:
        return False
    window = scoring.window
    if window is None:
        return True
    if window.chunked:
        origin = start - window.before
        return (query - origin) // window.size == (key - origin) // window.size
    return query - key < window.size


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scoring: Scoring) -> Tensor:
    """Attention of q (rows, heads, queries, dim), the last of the positions of k and v (rows, kv_heads, keys, dim).

    Returns float64. A query that attends to nothing results in zero.
    """
    rows, heads, queries, _ = q.shape
    keys = k.shape[2]
    k, v = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = q.double() @ k.mT * scoring.scale
    if scoring.cap is not None:
        scores = scoring.cap * (scores / scoring.cap).tanh()
    places = range(keys - queries, keys)
    for head, slope in enumerate(scoring.slopes):
        scores[:, head] += slope * torch.tensor([[key - place for key in range(keys)] for place in places])
    for row, start in enumerate(starts):
        seen = torch.tensor([[sees(scoring, place, key, start) for key in range(keys)] for place in places])
        scores[row].masked_fill_(~seen, -math.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if scoring.sinks is not None:
        total = total + scoring.sinks.double().exp().view(1, -1, 1, 1)
    return (weights / total).nan_to_num() @ v.masked_fill(v.isnan(), 0)
