"""Decode cells that a CPU repeats from tapes (`kernels/tape.py`): which they are, and the memory that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from flexgen.kernels.loading import HALVES
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.rows import whole_weights
from flexgen.layout.topology import Topology
from flexgen.models import Layer
from flexgen.models.attention import Attention
from flexgen.models.embed import Head
from flexgen.models.layer import AttentionLayer, TransformerLayer
from flexgen.models.mixture import Mixture
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec
from flexgen.models.norm_spec import NormSpec
from flexgen.policy import Policy
from flexgen.units import MIB

MIN_TOKENS = 3
"""A run of more than this number of tokens is recorded: to record a cell takes longer than to compute it."""
MOST_BYTES = 8 * MIB
"""Bytes of temporaries that the tapes of a block keep. Further cells are computed without tapes."""

_GATES = "silu", "swish"


def recordable(
    layers: Sequence[Layer], placement: Placement, policy: Policy, passes: Passes, topology: Topology
) -> tuple[int, ...]:
    """The numbers of the layers whose decode cells a tape repeats, if all rows of a batch have the same length.

    A tape reads fixed addresses. So weights and cache must stay in place, all rows in the same pages. In float32,
    and to encode keys and values, layers also use operations of torch.
    """
    if placement.dtype not in HALVES:
        return ()
    tiers = [tier for tier, rows in policy.cache.rows(policy.gpu_batch_size).items() if rows]
    cached = len(tiers) == 1 and topology.in_place(tiers[0]) and policy.attn_sparsity == 1
    cached = cached and policy.cache[tiers[0]].codec == "none" and not passes.shared
    return tuple(
        j
        for j, layer in enumerate(layers)
        if isinstance(layer, TransformerLayer | Head)
        and all(topology.in_place(placement.of(w)) for w in whole_weights(layer, placement, topology))
        and _compiled(layer)
        and (not isinstance(layer, AttentionLayer) or (cached and layer.layer_spec.attention.window is None))
    )


def _compiled(layer: Layer) -> bool:
    """Whether compiled kernels compute all of a decode cell."""
    spec, own = layer.spec, layer.layer_spec
    if own is None:
        return _rms(spec.final_norm) and spec.logit_scale == 1 and spec.logit_cap is None
    if not isinstance(layer, Attention) and not _gated(own.mlp):
        return False
    norms = (getattr(own.norms, name.name) for name in fields(own.norms))
    return all(map(_rms, norms)) and own.residual_scale == 1 and not own.scaled


def _gated(mlp: MLPSpec | MixtureSpec) -> bool:
    if isinstance(mlp, MLPSpec):
        return mlp.gated and mlp.activation in _GATES
    alone = mlp.norms is None and mlp.shared is None and mlp.scale == 1
    plain = alone and mlp.clamped is None and not mlp.bias and mlp.weighted == "outputs"
    return plain and mlp.router.groups == 1 and not mlp.expert_scale and mlp.activation in _GATES


def _rms(norm: NormSpec | None) -> bool:
    return norm is None or norm.kind == "rms"


def kept_bytes(layers: Sequence[Layer], numbers: Sequence[int], rows: int, dtype: torch.dtype) -> int:
    """An estimate of the bytes that the tapes of a batch's decode cells keep. Equal layers share the memory of their
    results with every other one.

    numbers: those of the layers that have tapes.
    """
    kinds = {(j % 2, temporary_bytes(layers[j], rows, dtype)) for j in numbers}
    return sum(nbytes for _, nbytes in kinds)


def temporary_bytes(layer: Layer, rows: int, dtype: torch.dtype) -> int:
    """An estimate of the bytes that the tape of a decode cell keeps: the results of its norms, products and
    attention."""
    if isinstance(layer, Mixture):
        return rows * _mixture_values(layer) * dtype.itemsize
    matrices = [weight for weight in layer.weights if len(weight.shape) == 2]
    values = layer.spec.hidden_size + sum(weight.shape[0] for weight in matrices)
    if isinstance(layer, AttentionLayer):
        values += layer.layer_spec.attention.q_size
    return rows * values * dtype.itemsize


def _mixture_values(layer: Mixture) -> int:
    """The values of a token that the tape of a mixture keeps: its experts have a copy of their input."""
    own = layer.layer_spec.mlp
    assert isinstance(own, MixtureSpec)
    hidden, router = layer.spec.hidden_size, own.router
    return 2 * hidden + router.experts + router.top_k * 2 * (hidden + own.size)
