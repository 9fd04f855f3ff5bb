"""Attention over a prefix that all rows share: keys and values that are stored once."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flexgen.kernels.compiled_attention import prefix_compiled
from flexgen.kernels.partial import Partial, flash_part
from flexgen.kernels.scoring import Scoring, Window, capped, constants, softmax_part

SCORE_VALUES = 1 << 23
"""The most scores of all rows and heads that exist at once: 32 MiB in float32. A single row may have more."""


def attend_prefix(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, positions: Tensor | None = None, base: int = 0
) -> Partial:
    """Attention of q (rows, heads, new, head_dim) over the tokens of a prefix that all rows share.

    k and v (kv_heads, tokens, head_dim), in the dtype of q: plain values, on its device. Every query is after every
    token of the prefix.
    positions (rows,): integers, the positions of each row's first new token; the others follow. They count from the
    start of the text, so a row without padding that has n own tokens in its cache begins at the tokens of all its
    prefixes plus n. Needed for windows and ALiBi. A query before base + tokens is padding and attends to nothing.
    Leave them out for other layers, where they cost time: then padding has results of no meaning.
    base: the position of the first token of k and v, for a prefix after another prefix.

    Leaves out sinks: they are in the part with the row's own tokens (`Scoring.after`).
    Raises ValueError if shapes do not match, or positions are missing.
    """
    _check(q, k, v, scoring, positions)
    if not q.numel():
        return Partial(q.float(), q.new_empty(q.shape[:3], dtype=torch.float32))
    first = None
    if positions is not None:
        keys, new = range(base, base + k.shape[1]), torch.arange(q.shape[2], device=positions.device)
        first, positions = _first_seen(scoring.window, positions[:, None] + new, keys), positions - base
    part = prefix_compiled(q, k, v, scoring, first, positions)
    return prefix_in_torch(q, k, v, scoring, first, positions) if part is None else part


def _check(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, positions: Tensor | None) -> None:
    rows, heads, _, head_dim = q.shape
    kv_heads = k.shape[0]
    if k.dim() != 3 or k.shape != v.shape or k.shape[2] != head_dim or not k.numel() or heads % kv_heads:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: expected (rows, heads, new, "
            "head_dim) and (kv_heads, tokens, head_dim), and a multiple of kv_heads heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: expected the same"
        )
    if positions is None and (scoring.window is not None or scoring.slopes):
        raise ValueError("a window or ALiBi needs the positions of the new tokens")
    if positions is not None and positions.shape != (rows,):
        raise ValueError(f"positions have shape {tuple(positions.shape)}: expected ({rows},)")


def _first_seen(window: Window | None, positions: Tensor, keys: range) -> Tensor:
    """The index of the first of `keys` that each query at `positions` (rows, new) attends to; len(keys) for none."""
    first = torch.zeros_like(positions)
    if window is not None:
        first = window.begin(positions)
    padding = positions < keys.stop
    return (first - keys.start).clamp(0, len(keys)).masked_fill_(padding, len(keys))


def prefix_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    first: Tensor | None = None,
    positions: Tensor | None = None,
) -> Partial:
    """`prefix_compiled` in torch, on every device. Computes a few queries at a time, within `SCORE_VALUES`."""
    if first is None and scoring.cap is None and not scoring.slopes:
        fused = _fused(q, k, v, scoring.scale)
        if fused is not None:
            return fused
    rows, heads, new, head_dim = q.shape
    tokens = k.shape[1]
    values = q.new_empty(rows, heads, new, head_dim, dtype=torch.float32)
    lse = q.new_empty(rows, heads, new, dtype=torch.float32)
    queries = max(SCORE_VALUES // max(heads * tokens, 1), 1)
    row_step, step = max(queries // max(new, 1), 1), min(queries, max(new, 1))
    places = torch.arange(tokens, device=q.device)
    for row, begin in itertools.product(range(0, rows, row_step), range(0, new, step)):
        some, part = slice(row, row + row_step), slice(begin, begin + step)
        scores = _scores(q[some, :, part], k, scoring)
        if scoring.slopes and positions is not None:
            fresh = torch.arange(begin, begin + scores.shape[2], device=q.device)
            apart = places - (positions.to(q.device)[some, None] + fresh)[:, None, :, None]
            scores += constants(scoring.slopes, q.device)[:, None, None] * apart
        if first is not None:
            hidden = places < first.to(q.device)[some, None, part, None]
            scores.masked_fill_(hidden, float("-inf"))
        probabilities, lse[some, :, part] = softmax_part(scores, None)
        del scores
        values[some, :, part] = _weighted(probabilities.to(q.dtype), v)
    return Partial(values, lse)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial | None:
    """All queries of a K/V head as those of one row, with torch's fused attention if it supports them."""
    part = flash_part(_by_kv_head(q, len(k))[None], k[None], v[None], scale)
    if part is None:
        return None
    values, lse = part
    return Partial(_by_row(values[0], q), _by_row(lse[0].unsqueeze(-1), q).squeeze(-1))


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """x (rows, heads, new, n) as (kv_heads, rows * group * new, n)."""
    rows, n = x.shape[0], x.shape[3]
    return x.reshape(rows, kv_heads, -1, n).transpose(0, 1).reshape(kv_heads, -1, n)


def _by_row(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_by_kv_head`, for x of any last dimension."""
    rows, heads, new, _ = q.shape
    return x.reshape(len(x), rows, -1, x.shape[2]).transpose(0, 1).reshape(rows, heads, new, x.shape[2])


def _scores(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """The scores (rows, heads, new, tokens) in float32, for all tokens and without a bias."""
    # q is scaled before the product, because the product could overflow in float16.
    products = _by_kv_head(q * scoring.scale, len(k)) @ k.mT
    scores = _by_row(products.float(), q)
    return scores if scoring.cap is None else capped(scores, scoring.cap)


def _weighted(probabilities: Tensor, v: Tensor) -> Tensor:
    """The sums of values (rows, heads, new, head_dim)."""
    return _by_row(_by_kv_head(probabilities, len(v)) @ v, probabilities)
