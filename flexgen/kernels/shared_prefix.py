"""Attention over a prefix that all rows share: keys and values that are stored once."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flexgen.kernels.partial import Partial
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
    None: no padding. base: the position of the first token of k and v, for a prefix after another prefix.

    Leaves out sinks: they are in the part with the row's own tokens (`Scoring.after`).
    Raises ValueError if shapes do not match, or positions are missing.
    """
    _check(q, k, v, scoring, positions)
    return prefix_in_torch(q, k, v, scoring, positions, base)


def _check(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, positions: Tensor | None) -> None:
    rows, heads, _, head_dim = q.shape
    kv_heads = k.shape[0]
    if k.dim() != 3 or k.shape != v.shape or k.shape[2] != head_dim or not kv_heads or heads % kv_heads:
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


def prefix_in_torch(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, positions: Tensor | None = None, base: int = 0
) -> Partial:
    """`attend_prefix` in torch, on every device. Computes a few queries at a time, within `SCORE_VALUES`."""
    rows, heads, new, head_dim = q.shape
    tokens = k.shape[1]
    values = q.new_empty(rows, heads, new, head_dim, dtype=torch.float32)
    lse = q.new_empty(rows, heads, new, dtype=torch.float32)
    if positions is not None:
        positions = positions.to(q.device)[:, None] + torch.arange(new, device=q.device)
    queries = max(SCORE_VALUES // max(heads * tokens, 1), 1)
    row_step, step = max(queries // max(new, 1), 1), min(queries, max(new, 1))
    for row, first in itertools.product(range(0, rows, row_step), range(0, new, step)):
        some, part = slice(row, row + row_step), slice(first, first + step)
        at = None if positions is None else positions[some, part]
        found = _attend_all(q[some, :, part], k, v, scoring, at, base)
        values[some, :, part], lse[some, :, part] = found
    return Partial(values, lse)


def _attend_all(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, positions: Tensor | None, base: int
) -> tuple[Tensor, Tensor]:
    """positions (rows, new)."""
    rows, heads, new, head_dim = q.shape
    kv_heads, tokens = k.shape[:2]
    # q is scaled before the product, because the product could overflow in float16.
    query = (q * scoring.scale).reshape(rows, kv_heads, -1, head_dim).transpose(0, 1)
    scores = (query.reshape(kv_heads, -1, head_dim) @ k.mT).float().view(kv_heads, rows, -1, tokens)
    scores = scores.transpose(0, 1).reshape(rows, heads, new, tokens)
    if scoring.cap is not None:
        capped(scores, scoring.cap)
    if positions is not None:
        keys = range(base, base + tokens)
        if scoring.slopes:
            apart = torch.arange(keys.start, keys.stop, device=q.device) - positions[:, None, :, None]
            scores += constants(scoring.slopes, q.device)[:, None, None] * apart
        scores.masked_fill_(_hidden(scoring.window, positions, keys)[:, None], float("-inf"))
    probabilities, lse = softmax_part(scores, None)
    probabilities = probabilities.to(q.dtype).view(rows, kv_heads, -1, tokens).transpose(0, 1)
    values = (probabilities.reshape(kv_heads, -1, tokens) @ v).view(kv_heads, rows, -1, head_dim)
    return values.transpose(0, 1).reshape(q.shape).float(), lse


def _hidden(window: Window | None, positions: Tensor, keys: range) -> Tensor:
    """Whether queries at `positions` (rows, new) do not attend to each of `keys`.

    Returns (rows, new, keys), or without a window (rows, new, 1) for all keys.
    """
    padding = (positions < keys.stop).unsqueeze(-1)
    if window is None:
        return padding
    places = torch.arange(keys.start, keys.stop, device=positions.device)
    return padding | (places < _first_visible(window, positions).unsqueeze(-1))


def _first_visible(window: Window, positions: Tensor) -> Tensor:
    """`Window.first` of each position."""
    if window.chunked:
        return positions.div(window.size, rounding_mode="floor") * window.size
    return (positions - window.size + 1).clamp_min(0)
