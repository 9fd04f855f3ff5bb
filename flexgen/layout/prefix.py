"""A shared prefix: the tokens with which all prompts of a call begin. Their keys and values are stored once.

The cache of a prefix is like a weight: computed once, read-only, and the same for every batch. It is the KV cache of
a block of one row, without a codec. It has a home on one tier. If the compute device does not use that tier in place,
the cache of a layer is loaded with the weights of the layer.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen.layout.cache import Span
from flexgen.models import ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

SHORTEST = 32
"""The minimum number of tokens of a shared prefix. To compute a shorter one separately takes longer than it saves,
because the block that computes it loads all weights once more."""

_ROWS_IN_CODEC = 8
"""Rows without a codec take at most the bytes of this number of encoded ones."""


def shared_tokens(workload: Workload, policy: Policy) -> int:
    """The number of tokens that a call computes and stores once for all prompts.

    Sparse attention chooses from all tokens of a row, so with it nothing is shared.
    """
    shares = policy.share_prefix and policy.attn_sparsity == 1 and workload.num_prompts > 1
    return workload.prefix if shares and workload.prefix >= SHORTEST else 0


def sharing(spec: ModelSpec, workload: Workload) -> Workload:
    """The workload, without a prefix if keys depend on the length of the longest row of a batch."""
    return replace(workload, prefix=0) if spec.stretches(workload.capacity) else workload


def prefix_workload(tokens: int) -> Workload:
    """The workload of the block that computes a prefix."""
    return Workload(tokens, 1, 1)


def prefix_policy(policy: Policy) -> Policy:
    """The policy of the block that computes a prefix. Its cache is on the home of the prefix."""
    one = {"gpu_batch_size": 1, "num_gpu_batches": 1, "attend_on": "gpu", "guess": 0}
    return policy.replace(**one, cache={prefix_home(policy): 100})


def prefix_home(policy: Policy) -> Tier:
    """The fastest tier on which the rows of a batch would need more memory for their own copies of the prefix."""
    rows = policy.cache.rows(policy.gpu_batch_size)
    used = [tier for tier in Tier if rows[tier]]
    enough = (t for t in used if policy.cache[t].codec == "none" or len(rows[t]) >= _ROWS_IN_CODEC)
    return next(enough, used[-1])


def prefix_slots(slots: Slots) -> Slots:
    """The slots of the block that computes a prefix. Its cell slots later serve with the weight slots: the cache of
    a layer is loaded to the cell slot with the number of the layer's weight slot."""
    return replace(slots, cells=max(slots.cells, slots.weights))


def prefix_span(tokens: int) -> Span:
    """The span in which a prefix is loaded: its tokens are cached, and none is new."""
    return Span(tokens, 0)
