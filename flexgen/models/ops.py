"""The calculations of the layers, in plain torch: they run on every device and know no layer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
"""By the names that configurations use. Each may overwrite its argument."""

IN_PLACE = frozenset({"relu", "relu2", "silu", "swish"})
"""Those that do overwrite it, and so take no memory."""


@functools.lru_cache(maxsize=32)
def _frequencies(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def rope_tables(
    rope: RopeSpec, positions: Tensor, dtype: torch.dtype, length: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for `apply_rope`, each (batch, 1, seq, head_dim / 2) in `dtype`.

    Where the frequencies depend on the length, it is the largest position of the batch plus one, over all rows,
    as in transformers: `length`, which must be given where `positions` are a part of the batch's. It stays on
    the device: no synchronisation.
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
    """x (batch, heads, seq, head_dim) with its first 2n values rotated, where cos and sin have n for each token.

    The pairs are (j, j + n), or (2j, 2j + 1) if they are `interleaved`.
    """
    width = 2 * cos.shape[-1]
    first, second = _pairs(x[..., :width], interleaved)
    turned = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second values of the pairs that are rotated."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def token_factors(cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotate_token` takes, (batch, 4, 1, n), from `rope_tables` of one position for each row."""
    return torch.stack((cos, cos, -sin, sin), dim=1).flatten(1, 2)


def rotate_token(q: Tensor, k: Tensor, factors: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """`apply_rope` for q (batch, heads, 1, head_dim) and k (batch, kv_heads, 1, head_dim), in three launches; in five
    where only a part of each head is rotated."""
    batch, heads, _, head_dim = q.shape
    half = factors.shape[-1]
    (q1, q2), (k1, k2) = (_pairs(x[..., : 2 * half], interleaved) for x in (q, k))
    parts = torch.cat((q1, k1, q2, k2, q2, k2, q1, k1), dim=1).view(batch, 4, -1, half)
    parts.mul_(factors)
    shape = (half, 2) if interleaved else (2, half)
    out = parts.new_empty(batch, parts.shape[2], *shape)
    torch.add(parts[:, :2], parts[:, 2:], out=out.movedim(3 if interleaved else 2, 1))
    rotated = out.view(batch, -1, 1, 2 * half)
    if 2 * half < head_dim:
        rest = torch.cat((q[..., 2 * half :], k[..., 2 * half :]), dim=1)
        rotated = torch.cat((rotated, rest), dim=-1)
    return rotated[:, :heads], rotated[:, heads:]


def scale_queries(q: Tensor, positions: Tensor, form: QueryScaling) -> Tensor:
    """q (batch, heads, seq, head_dim), multiplied in place as `form` says for `positions` (batch, seq)."""
    factors = 1 + form.beta * torch.log(1 + torch.floor(positions / form.length))
    return q.mul_(factors[:, None, :, None].to(q.dtype))


MASK_VALUES = 1 << 20
"""Largest mask that is made where queries stand at the end of their keys: 4 MiB in float32. At 16k keys that is 64
queries of every head at once."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None, scale: float) -> Tensor:
    """Attention of the prompt's tokens, or of its last ones, over the prompt.

    q (batch, heads, queries, head_dim), of the last of the seq tokens; k and v (batch, kv_heads, seq, head_dim);
    `starts[row]` is the number of padding positions at the left of the row, None for none. Returns (batch, heads,
    queries, head_dim), zero at padding positions.

    Padding needs no mask: neighbouring rows with the same start run together on their slice without it. Slices
    are views: rows sorted by length make the fewest calls. Scores (queries, seq) are never built in memory.
    """
    batch, heads, queries, head_dim = q.shape
    if starts is None or not any(starts):
        return _causal(q, k, v, scale)
    # Laid out by token, so that merging the heads afterwards is a view.
    out = q.new_zeros(batch, queries, heads, head_dim).transpose(1, 2)
    before = k.shape[2] - queries
    begin = 0
    for start, run in itertools.groupby(starts):
        end = begin + len(list(run))
        first = max(start - before, 0)
        if first < queries:
            rows = slice(begin, end)
            out[rows, :, first:] = _causal(q[rows, :, first:], k[rows, :, start:], v[rows, :, start:], scale)
        begin = end
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if heads == kv_heads:
        return _attend_last(q, k, v, scale)
    # `enable_gqa` falls back to full score matrices on CUDA in float32.
    if batch == 1:
        # The heads of a group see one view of their K and V.
        shape = (kv_heads, heads // kv_heads, keys, head_dim)
        k, v = (x.transpose(0, 1).expand(shape) for x in (k, v))
        return _attend_last(q.unflatten(1, shape[:2]).squeeze(0), k, v, scale).flatten(0, 1).unsqueeze(0)
    # Copies are small beside the attention, and one call serves all rows.
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return _attend_last(q, k, v, scale)


def _attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The queries are those of the last keys, and heads of both are as many."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    # Here torch's `is_causal` would align the first query with the first key. A mask of few queries is small,
    # whatever the length, and kernels that take one do not build scores either.
    out = torch.empty_like(q)
    step = max(MASK_VALUES // keys, 1)
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        seen = keys - queries + end
        hidden = torch.full((end - begin, seen), -math.inf, dtype=q.dtype, device=q.device)
        hidden.triu_(seen - (end - begin) + 1)
        out[:, :, begin:end] = F.scaled_dot_product_attention(
            q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], attn_mask=hidden, scale=scale
        )
    return out
