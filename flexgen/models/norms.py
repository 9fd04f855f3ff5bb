"""Norms: their computation, weights and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.norms import rms_norm
from flexgen.kernels.workspaces import Workspaces
from flexgen.models.sources import tensors
from flexgen.models.spec import ModelSpec, NormSpec, WeightSpec


def normalise(norm: NormSpec | None, x: Tensor, weights: Mapping[str, Any], name: str = "norm") -> Tensor:
    """`norm` of x (..., size), with the weights "<name>.weight" and "<name>.bias"; x itself if there is no norm."""
    if norm is None:
        return x
    weight = weights[f"{name}.weight"] if norm.weight else None
    if norm.kind == "rms":
        return rms_norm(x, weight, norm.eps, norm.plus, norm.cast == "before")
    if weight is not None and norm.plus:
        weight = weight + norm.plus
    return F.layer_norm(x, x.shape[-1:], weight, weights[f"{name}.bias"] if norm.bias else None, norm.eps)


def norm_weights(
    spec: ModelSpec,
    norm: NormSpec | None,
    module: str,
    index: int | None = None,
    name: str = "norm",
    size: int | None = None,
) -> tuple[WeightSpec, ...]:
    """The weights of `module`: "<name>.weight" and "<name>.bias", if the norm has them. `size` defaults to the hidden
    size."""
    if norm is None:
        return ()
    parts = [part for part, there in (("weight", norm.weight), ("bias", norm.bias)) if there]
    names = spec.module_names(module, index)
    shape = (spec.hidden_size if size is None else size,)
    return tuple(WeightSpec(f"{name}.{part}", shape, tensors(names, part)) for part in parts)


def norm_workspace(
    norm: NormSpec | None, size: int, tokens: int, dtype: torch.dtype, workspaces: Workspaces
) -> int:
    """The peak bytes to normalise `tokens` contiguous rows of `size` values, including the result."""
    if norm is None:
        return 0
    result = tokens * size * dtype.itemsize
    if norm.kind == "rms":
        return result + workspaces.rms_norm(tokens, size, dtype)
    # A layer norm stores two numbers for each row.
    weight = 2 * size * torch.float32.itemsize if norm.plus else 0
    return result + 2 * tokens * torch.float32.itemsize + weight
