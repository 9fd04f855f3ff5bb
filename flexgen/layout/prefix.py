"""A shared prefix: the tokens with which all prompts of a block begin. Their keys and values are stored once.

The cache of a prefix is like a weight: computed once, read-only, and the same for every batch. It is the KV cache of
a block of one row, without a codec. It has a home on one tier. If the compute device does not use that tier in place,
the cache of a layer is loaded with the weights of the layer.

A prefix may have several parts, each computed by a block of one row whose prefix is the parts before it. Blocks of
other prompts use the same first parts (`runtime/prefix_groups.py`).
"""

from __future__ import annotations

from dataclasses import replace

from flexgen.layout.cache import Span
from flexgen.models import ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

SHORTEST = 32
"""The minimum number of tokens of a part of a prefix. To compute a shorter one separately takes longer than it saves,
because the block that computes it loads all weights once more."""

_ROWS_IN_CODEC = 8
"""Rows without a codec take at most the bytes of this number of encoded ones."""


def shared_tokens(workload: Workload, policy: Policy) -> int:
    """The number of tokens that a call computes and stores once for all prompts."""
    return workload.prefix if shares(policy) and workload.prefix >= SHORTEST else 0


def shares(policy: Policy) -> bool:
    """Whether prompts may share a prefix. Sparse attention chooses from all tokens of a row, so with it none does."""
    return policy.share_prefix and policy.attn_sparsity == 1


def sharing(spec: ModelSpec, workload: Workload) -> Workload:
    """The workload, without a prefix if it has one prompt, or if keys depend on the length of the longest row of a
    batch."""
    alone = workload.num_prompts == 1 or spec.stretches(workload.capacity)
    return replace(workload, prefix=0, cuts=(), groups=1) if alone else workload


def grouped(workload: Workload, policy: Policy) -> Workload:
    """The workload, as one group if a call with this policy shares no prefix."""
    return workload if shared_tokens(workload, policy) else replace(workload, groups=1)


def prefix_workloads(workload: Workload, policy: Policy) -> tuple[Workload, ...]:
    """The workload of each block that computes a part of the prefix, in order; () if nothing is shared."""
    if not shared_tokens(workload, policy):
        return ()
    cuts = [cut for cut in workload.cuts if cut >= SHORTEST]
    begins, ends = [0, *cuts], [*cuts, workload.prefix]
    return tuple(
        Workload(end, 1, 1, begin, cuts=tuple(cuts[: max(n - 1, 0)]))
        for n, (begin, end) in enumerate(zip(begins, ends, strict=True))
    )


def prefix_policy(policy: Policy) -> Policy:
    """The policy of the blocks that compute a prefix. Their cache is on the home of the prefix."""
    one = {"gpu_batch_size": 1, "num_gpu_batches": 1, "attend_on": "gpu"}
    one |= {"prefill_rows": 0, "guess": 0, "reserve_new": 0}
    return policy.replace(**one, cache={prefix_home(policy): 100})


def prefix_home(policy: Policy) -> Tier:
    """The fastest tier on which the rows of a batch would need more memory for their own copies of the prefix."""
    rows = policy.cache.rows(policy.gpu_batch_size)
    used = [tier for tier in Tier if rows[tier]]
    enough = (t for t in used if policy.cache[t].codec == "none" or len(rows[t]) >= _ROWS_IN_CODEC)
    return next(enough, used[-1])


def prefix_slots(slots: Slots) -> Slots:
    """The slots of the blocks that compute a prefix. Their cell slots later serve with the weight slots: the cache of
    a layer is loaded to the cell slot with the number of the layer's weight slot."""
    return replace(slots, cells=max(slots.cells, slots.weights))


def prefix_span(tokens: int) -> Span:
    """The span in which a part of a prefix is loaded: its tokens are cached, and none is new."""
    return Span(tokens, 0)
