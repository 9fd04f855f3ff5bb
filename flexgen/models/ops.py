"""The operations of the layers in plain torch. They run on every device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.models.spec import NormSpec, RopeSpec


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "silu": functools.partial(F.silu, inplace=True),
    "swish": functools.partial(F.silu, inplace=True),
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""Activation functions by the names in configs. They may overwrite their argument."""

IN_PLACE = frozenset({"relu", "silu", "swish"})
"""The activations that overwrite their argument, and so allocate no memory."""


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dimension in float32, like transformers. The product with the weight is too on a GPU."""
    if x.is_cuda:  # one launch
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * inverse).to(x.dtype)
    return normed if weight is None else normed.mul_(weight)


def normalise(norm: NormSpec, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`norm` of x (..., hidden), with the layer's "norm.*" weights if it is affine."""
    if norm.kind == "rmsnorm":
        return rms_norm(x, weights.get("norm.weight"), norm.eps)
    return layer_norm(x, weights.get("norm.weight"), weights.get("norm.bias"), norm.eps)


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


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim / 2) of x (batch, heads, seq, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def token_factors(cos: Tensor, sin: Tensor) -> Tensor:
    """The factors of `rotate_token`, (batch, 4, 1, head_dim / 2), from `rope_tables` of one position per row."""
    return torch.stack((cos, cos, -sin, sin), dim=1).flatten(1, 2)


def rotate_token(q: Tensor, k: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rope` for q (batch, heads, 1, head_dim) and k (batch, kv_heads, 1, head_dim), in three launches."""
    batch, heads, _, head_dim = q.shape
    (q1, q2), (k1, k2) = (x.chunk(2, dim=-1) for x in (q, k))
    parts = torch.cat((q1, k1, q2, k2, q2, k2, q1, k1), dim=1).view(batch, 4, -1, head_dim // 2)
    parts.mul_(factors)
    out = parts.new_empty(batch, parts.shape[2], 2, head_dim // 2)
    torch.add(parts[:, :2], parts[:, 2:], out=out.transpose(1, 2))
    rotated = out.view(batch, -1, 1, head_dim)
    return rotated[:, :heads], rotated[:, heads:]


MASK_VALUES = 1 << 20
"""The largest attention mask, for queries at the end of their keys: 4 MiB in float32. With 16k keys, this is 64
queries of every head at once."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None, scale: float) -> Tensor:
    """Causal attention of the tokens of a prompt, or of its last tokens, over the prompt.

    q (batch, heads, queries, head_dim) has the last of the seq tokens; k and v are (batch, kv_heads, seq, head_dim).
    starts[row] is the number of padding positions at the left of the row; None if there is no padding. Returns
    (batch, heads, queries, head_dim), zero at padding positions.

    Padding needs no mask: adjacent rows with the same start run together on a slice without the padding. Slices are
    views, so rows sorted by length need the fewest calls. The scores (queries, seq) are never stored in memory.
    """
    batch, heads, queries, head_dim = q.shape
    if starts is None or not any(starts):
        return _causal(q, k, v, scale)
    # Token-major, so that merging the heads afterwards is a view.
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
        # The heads of a group share one view of their K and V.
        shape = (kv_heads, heads // kv_heads, keys, head_dim)
        k, v = (x.transpose(0, 1).expand(shape) for x in (k, v))
        return _attend_last(q.unflatten(1, shape[:2]).squeeze(0), k, v, scale).flatten(0, 1).unsqueeze(0)
    # The copies are small compared to the attention, and one call serves all rows.
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return _attend_last(q, k, v, scale)


def _attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention with equal numbers of heads, for the queries of the last keys."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    # `is_causal` would align the first query with the first key here, so use a mask. For few queries it is small at
    # any length, and kernels with a mask do not store the scores either.
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
