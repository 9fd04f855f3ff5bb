"""The operations of the layers in plain torch. They run on every device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.compiled_attention import prompt_compiled
from flexgen.kernels.elementwise import silu_product
from flexgen.kernels.partial import Partial, flash_part
from flexgen.kernels.result_memory import RESULT_MEMORY
from flexgen.kernels.rotation import pairs_of, rotate_tokens, rotates_tokens
from flexgen.kernels.scoring import (
    Scoring,
    Window,
    bend,
    capped,
    softmax_part,
    softmax_with_sinks,
    visible,
)
from flexgen.models.spec import QueryScaling, RopeSpec


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu_(x).square_()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "relu2": _squared_relu,
    "silu": functools.partial(F.silu, inplace=True),
    "swish": functools.partial(F.silu, inplace=True),
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""Activation functions by the names in configs. They may overwrite their argument."""

IN_PLACE = frozenset({"relu", "relu2", "silu", "swish"})
"""The activations that overwrite their argument, and so allocate no memory."""


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """The activation of gate, times up: contiguous. It may overwrite gate."""
    if activation in ("silu", "swish"):
        return silu_product(gate, up)
    active = ACTIVATIONS[activation](gate)
    return active.mul_(up) if active.is_contiguous() else active * up


@functools.lru_cache(maxsize=32)
def _frequencies(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def rope_tables(
    rope: RopeSpec, positions: Tensor, dtype: torch.dtype, length: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for `apply_rope`, each (batch, 1, seq, head_dim / 2) in `dtype`.

    length: for frequencies that depend on the length, the largest position of all rows of the batch plus one, as in
    transformers. Give it if `positions` are only a part of the batch. It stays on the device, without a
    synchronisation.
    """
    if length is None and rope.kind in ("dynamic", "longrope"):
        length = positions.max() + 1
    frequencies = _frequencies(rope.inv_freq, positions.device)
    if rope.kind == "dynamic" and length is not None:
        length = length.clamp_min(rope.original_max_positions)
        dim = 2 * len(rope.inv_freq)
        stretch = rope.factor * length / rope.original_max_positions - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        frequencies = 1.0 / theta**exponents
    elif rope.kind == "longrope" and length is not None:
        long = _frequencies(rope.long_inv_freq, positions.device)
        frequencies = torch.where(length > rope.original_max_positions, long, frequencies)
    angles = positions[:, None, :, None].float() * frequencies
    return (angles.cos() * rope.scaling).to(dtype), (angles.sin() * rope.scaling).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2n values of each head of x (batch, heads, seq, head_dim), where n is the last dimension of
    cos.

    It may overwrite x. The pairs are (j, j + n), or (2j, 2j + 1) if they are `interleaved`.
    """
    if not interleaved and rotates_tokens(x, cos):
        return rotate_tokens(x, cos, sin)
    width = 2 * cos.shape[-1]
    partial = width < x.shape[-1]
    first, second = pairs_of(x[..., :width] if partial else x, interleaved)
    turned = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((rotated, x[..., width:]), dim=-1) if partial else rotated


def scale_queries(q: Tensor, positions: Tensor, form: QueryScaling) -> Tensor:
    """Scale q (batch, heads, seq, head_dim) in place for `positions` (batch, seq). Returns q."""
    factors = 1 + form.beta * torch.log(1 + torch.floor((positions + form.offset) / form.length))
    return q.mul_(factors[:, None, :, None].to(q.dtype))


MASK_VALUES = 1 << 20
"""The largest attention mask, for queries at the end of their keys: 4 MiB in float32. With 16k keys, this is 64
queries of every head at once."""


SCORE_VALUES = 1 << 23
"""The most scores of all rows and heads that exist at once where torch's fused attention cannot compute them: 32 MiB
in float32. A single query of every head may have more."""


Results = tuple[Tensor, ...]
"""Attention (batch, heads, queries, head_dim); for a part also its log-sum-exp (batch, heads, queries)."""


class _Softmax(NamedTuple):
    """The two ways to compute a block of queries.

    `fused` (q, k, v, scale, causal, mask) is torch's fused attention, or None if scores must be built. `of_scores`
    (scores, sinks) returns the probabilities in place of the attention.
    """

    fused: Callable[[Tensor, Tensor, Tensor, float, bool, Tensor | None], Results | None]
    of_scores: Callable[[Tensor, Tensor | None], Results]


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Results:
    return (F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale),)


_WHOLE = _Softmax(_fused, lambda scores, sinks: (softmax_with_sinks(scores, sinks),))
_PART = _Softmax(flash_part, softmax_part)


def causal_part(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None, scoring: Scoring) -> Partial:
    """`causal_attention` as a part of the attention over more tokens. With sinks, these are in the part."""
    values, lse = _attend_runs(q, k, v, starts, scoring, _PART)
    return Partial(values.float(), lse)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None, scoring: Scoring
) -> Tensor:
    """Causal attention of the tokens of a prompt, or of its last tokens, over the prompt.

    q (batch, heads, queries, head_dim) has the last of the seq tokens; k and v are (batch, kv_heads, seq, head_dim).
    starts[row] is the position of the row's first token. Positions before it are padding at the left. If keys before
    a window are left out, it may be negative. None if there is no padding. Returns (batch, heads, queries, head_dim),
    zero at padding positions.

    Padding needs no mask: adjacent rows with the same start run together on a slice without the padding. Slices are
    views, so rows sorted by length need the fewest calls. Plain scores (queries, seq) are never stored in memory.
    """
    return _attend_runs(q, k, v, starts, scoring, _WHOLE)[0]


def _room(q: Tensor, softmax: _Softmax) -> Results:
    """Memory for the results. Values are stored by token, so that merging the heads afterwards is a view."""
    batch, heads, queries, head_dim = q.shape
    values = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    if softmax is _WHOLE:
        return (values,)
    return values, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _attend_runs(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None, scoring: Scoring, softmax: _Softmax
) -> Results:
    """`causal_attention`, of runs of adjacent rows with the same start."""
    queries = q.shape[2]
    if starts is None or not any(starts):
        return _causal(q, k, v, scoring, 0, softmax)
    results = _room(q, softmax)
    for out, padding in zip(results, (0.0, -math.inf), strict=False):
        out.fill_(padding)
    before = k.shape[2] - queries
    begin = 0
    for start, run in itertools.groupby(starts):
        end = begin + len(list(run))
        first, padded = max(start - before, 0), max(start, 0)
        if first < queries:
            rows = slice(begin, end)
            some = q[rows, :, first:], k[rows, :, padded:], v[rows, :, padded:]
            for out, found in zip(results, _causal(*some, scoring, min(start, 0), softmax), strict=True):
                out[rows, :, first:] = found
        begin = end
    return results


def _causal(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, start: int, softmax: _Softmax) -> Results:
    """start: the position of the rows' first token, at most 0."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    compiled = prompt_compiled(
        q, k, v, scoring, _window_begins(scoring.window, range(keys - queries, keys), start)
    )
    if compiled is not None:
        return compiled if softmax is _PART else compiled[:1]
    RESULT_MEMORY.return_unused()
    if not scoring.plain:
        return _attend_scored(q, k, v, scoring, start, softmax)
    if heads == kv_heads:
        return _attend_last(q, k, v, scoring, start, softmax)
    # `enable_gqa` falls back to full score matrices on CUDA in float32.
    if batch == 1:
        # The heads of a group share one view of their K and V.
        shape = (kv_heads, heads // kv_heads, keys, head_dim)
        k, v = (x.transpose(0, 1).expand(shape) for x in (k, v))
        out = _attend_last(q.unflatten(1, shape[:2]).squeeze(0), k, v, scoring, start, softmax)
        return tuple(x.flatten(0, 1).unsqueeze(0) for x in out)
    # The copies are small compared to the attention, and one call serves all rows.
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return _attend_last(q, k, v, scoring, start, softmax)


def _window_begins(window: Window | None, positions: range, start: int) -> Tensor | None:
    """The first position that the query at each of `positions` attends to, int64 in host memory; None for 0."""
    if window is None or window.first(positions.stop - 1 - start) + start <= 0:
        return None
    there = torch.arange(positions.start, positions.stop) - start
    return (window.begin(there) + start).clamp_min_(0)


def query_blocks(
    queries: int, keys: int, window: Window | None, most: int, start: int = 0
) -> Iterator[tuple[range, range]]:
    """Blocks of the last `queries` of `keys` positions, each with the keys that its queries attend to.

    Both are ranges of positions. A block has at most `most` pairs of them, or one query. start: as for `_causal`.
    """
    begin = keys - queries
    while begin < keys:
        first = 0 if window is None else max(window.first(begin - start) + start, 0)
        before = begin - first
        # The largest n with n * (before + n) <= most.
        count = max((math.isqrt(before * before + 4 * most) - before) // 2, 1)
        if window is not None:  # a longer block would have as many more masked pairs
            count = min(count, window.size)
        end = min(begin + count, keys)
        yield range(begin, end), range(first, end)
        begin = end


def _attend_last(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, start: int, softmax: _Softmax) -> Results:
    """Causal attention of plain scores with equal numbers of heads, for the queries of the last keys."""
    queries, keys = q.shape[2], k.shape[2]
    window = scoring.window
    if window is not None and window.first(keys - 1 - start) + start <= 0:
        window = None  # no query has more tokens before it
    if queries == keys and window is None:
        found = softmax.fused(q, k, v, scoring.scale, True, None)
        return _attend_scored(q, k, v, scoring, start, softmax) if found is None else found
    # `is_causal` would align the first query with the first key here, so use a mask. For few queries it is small at
    # any length, and kernels with a mask do not store the scores either.
    results = _room(q, softmax)
    begin = keys - queries
    for block, seen in query_blocks(queries, keys, window, MASK_VALUES, start):
        mask = torch.full((len(block), len(seen)), -math.inf, dtype=q.dtype, device=q.device)
        if window is None:
            mask.triu_(block.start - seen.start + 1)
        else:
            mask.masked_fill_(visible(window, block, seen, start, q.device), 0.0)
        here, there = slice(block.start - begin, block.stop - begin), slice(seen.start, seen.stop)
        some = q[:, :, here], k[:, :, there], v[:, :, there]
        found = softmax.fused(*some, scoring.scale, False, mask)
        if found is None:
            return _attend_scored(q, k, v, scoring, start, softmax)
        for out, part in zip(results, found, strict=True):
            out[:, :, here] = part
    return results


def _attend_scored(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, start: int, softmax: _Softmax
) -> Results:
    """`_causal` for scores with a cap, a bias or sinks, which torch's fused attention does not have."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    results = _room(q, softmax)
    begin = keys - queries
    for block, seen in query_blocks(
        queries, keys, scoring.window, SCORE_VALUES // max(batch * heads, 1), start
    ):
        here, there = slice(block.start - begin, block.stop - begin), slice(seen.start, seen.stop)
        query = (q[:, :, here] * scoring.scale).reshape(batch, kv_heads, -1, head_dim)
        scores = (query @ k[:, :, there].mT).float().view(batch, heads, len(block), len(seen))
        if scoring.cap is not None:
            capped(scores, scoring.cap)
        if scoring.slopes:
            bend(scores, scoring.slopes, block, seen)
        scores.masked_fill_(~visible(scoring.window, block, seen, start, q.device), -math.inf)
        probabilities, *lse = softmax.of_scores(scores, scoring.sinks)
        del scores
        weights = probabilities.to(q.dtype).view(batch, kv_heads, -1, len(seen))
        values = (weights @ v[:, :, there]).view(batch, heads, len(block), head_dim)
        for out, part in zip(results, (values, *lse), strict=True):
            out[:, :, here] = part
    return results


def scored_bytes(rows: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> int:
    """The most bytes of scores and probabilities in `causal_attention` where scores are not plain."""
    values = max(min(SCORE_VALUES, rows * heads * queries * keys), rows * heads * keys)
    # The product and probabilities in `dtype`; scores, scores with sinks and probabilities in float32.
    return values * (2 * dtype.itemsize + 3 * torch.float32.itemsize)
