"""The calculations of the layers, in plain torch: they run on every device and know no layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.models.spec import ModelSpec, RopeSpec


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
"""By the names that configurations use. Each may overwrite its argument."""


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32 up to the weight as in transformers."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * inverse).to(x.dtype)
    return normed if weight is None else normed.mul_(weight)


def normalise(spec: ModelSpec, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The model's norm of x (..., hidden), with the layer's "norm.*" weights where it has any."""
    if spec.norm == "rmsnorm":
        return rms_norm(x, weights.get("norm.weight"), spec.norm_eps)
    return layer_norm(x, weights.get("norm.weight"), weights.get("norm.bias"), spec.norm_eps)


@functools.lru_cache(maxsize=32)
def _frequencies(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def rope_tables(rope: RopeSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `apply_rope`, each (batch, 1, seq, head_dim / 2) in `dtype`.

    Where the frequencies depend on the length, it is the largest position given plus one, over all rows of
    the batch, as in transformers. It stays on the device: no synchronisation.
    """
    frequencies = _frequencies(rope.inv_freq, positions.device)
    if rope.kind == "dynamic":
        length = (positions.max() + 1).clamp_min(rope.original_max_positions)
        dim = 2 * len(rope.inv_freq)
        stretch = rope.factor * length / rope.original_max_positions - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        frequencies = 1.0 / theta**exponents
    elif rope.kind == "longrope":
        long = _frequencies(rope.long_inv_freq, positions.device)
        frequencies = torch.where(positions.max() + 1 > rope.original_max_positions, long, frequencies)
    angles = positions[:, None, :, None].float() * frequencies
    return (angles.cos() * rope.scaling).to(dtype), (angles.sin() * rope.scaling).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim / 2) of x (batch, heads, seq, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None, scale: float) -> Tensor:
    """Attention of the prompt's tokens over the prompt.

    q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim); `starts[row]` is the number of
    padding positions at the left of the row, None for none. Returns (batch, heads, seq, head_dim), zero at
    padding positions.

    There is no mask: neighbouring rows with the same start run together on their slice without padding, so
    that torch always takes a kernel that never builds (seq, seq) scores in memory. Slices are views: rows
    sorted by length make the fewest calls.
    """
    batch, heads, seq, head_dim = q.shape
    if starts is None or not any(starts):
        return _causal(q, k, v, scale)
    # Laid out by token, so that merging the heads afterwards is a view.
    out = q.new_zeros(batch, seq, heads, head_dim).transpose(1, 2)
    begin = 0
    for start, run in itertools.groupby(starts):
        end = begin + len(list(run))
        if start < seq:
            rows, tokens = slice(begin, end), slice(start, None)
            out[rows, :, tokens] = _causal(q[rows, :, tokens], k[rows, :, tokens], v[rows, :, tokens], scale)
        begin = end
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        # Copies of K and V are small beside the attention; `enable_gqa` falls back to full score matrices
        # on CUDA in float32.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
