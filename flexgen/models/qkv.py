"""The split of fused query, key and value projections, and the norms of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.models.layer import Weights
from flexgen.models.norms import norm_weights, normalise
from flexgen.models.sources import tensors
from flexgen.models.spec import AttentionSpec, ModelSpec, QKNormSpec, WeightSpec

_PARTS = 4
"""The number of parts in the form "mp4"."""


def split_qkv(own: AttentionSpec, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (batch, seq, heads, head_dim), keys and values (batch, seq, kv_heads, head_dim) from the product with a
    fused matrix, `made` (batch, seq, q_size + 2 * kv_size). They are views if the form allows it."""
    batch, seq, _ = made.shape
    if own.qkv == "rows":
        q, k, v = made.view(batch, seq, -1, own.head_dim).split(
            [own.heads, own.kv_heads, own.kv_heads], dim=2
        )
    elif own.qkv == "heads":
        q, k, v = made.view(batch, seq, own.heads, 3, own.head_dim).unbind(dim=3)
    elif own.qkv == "groups":
        groups = made.view(batch, seq, own.kv_heads, -1, own.head_dim)
        q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    else:
        parts = made.view(batch, seq, _PARTS, 3, -1).unbind(dim=3)
        q, v, k = (part.reshape(batch, seq, own.heads, own.head_dim) for part in parts)
    return q, k, v


def head_norm_weights(spec: ModelSpec, index: int) -> tuple[WeightSpec, ...]:
    """The weights "q_norm.*" and "k_norm.*" of layer `index`. If checkpoints have a tensor for each head, there is
    one weight for each head ("q_norm.3.weight")."""
    own = spec.layers[index].attention
    if own.qk_norm is None:
        return ()
    weights: tuple[WeightSpec, ...] = ()
    for module, heads in (("q_norm", own.heads), ("k_norm", own.kv_heads)):
        if own.qk_norm.over == "each" and spec.by_head(module):
            weights += tuple(
                WeightSpec(
                    f"{module}.{head}.weight",
                    (own.head_dim,),
                    tensors(spec.module_names(module, index, head), "weight"),
                )
                for head in range(heads)
            )
        elif own.qk_norm.over == "each":
            sources = tensors(spec.module_names(module, index), "weight")
            shape = heads, own.head_dim
            weights += (WeightSpec(f"{module}.weight", (heads * own.head_dim,), sources, unflattened=shape),)
        else:
            size = own.head_dim if own.qk_norm.over == "head" else heads * own.head_dim
            weights += norm_weights(spec, own.qk_norm.norm, module, index, module, size)
    return weights


def normalised_heads(form: QKNormSpec, x: Tensor, weights: Weights, name: str) -> Tensor:
    """Normalise x (batch, heads, seq, head_dim) with the weights "<name>.*"."""
    if form.over == "head":
        return normalise(form.norm, x, weights, name)
    flat = x.transpose(1, 2).flatten(2)
    if form.over == "all":
        return normalise(form.norm, flat, weights, name).view(*flat.shape[:2], *x.shape[1::2]).transpose(1, 2)
    own = [weights[f"{name}.{head}.weight"] for head in range(x.shape[1]) if f"{name}.weight" not in weights]
    weight = torch.cat(own) if own else weights[f"{name}.weight"]
    normed = normalise(form.norm, x.float(), {f"{name}.weight": None}, name)
    return normed.mul_(weight.float().view(x.shape[1], 1, -1)).to(x.dtype)
