"""The cache of a block whose rows take memory page by page as they grow (`Policy.reserve_new`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch

from flexgen.layout.cache_needs import BatchCache, batch_cache, kinds_of_attention
from flexgen.layout.needs import Need
from flexgen.layout.passes import Passes
from flexgen.layout.topology import Topology
from flexgen.models import Layer
from flexgen.policy import Policy, Tier
from flexgen.workload import Workload


class CachePool:
    """The pages that the batches of a block share.

    The pool has pages for some tokens of each row, and for one batch up to the end of its longest answer. So the rows
    of at least one batch can always continue. `nbytes`: its bytes by tier.
    """

    def __init__(
        self, cache_of: Callable[[int], BatchCache], batches: Sequence[int], columns: int, capacity: int
    ) -> None:
        """cache_of: the cache of a batch of some rows. batches: the rows of each batch of a full block. columns: the
        tokens of each row that are reserved, the prompt included. capacity: those of the longest row."""
        self._largest = cache_of(max(batches))
        self.taken = cache(lambda rows, tokens: cache_of(rows).growing(tokens))
        total = Counter[Tier](self.taken(max(batches), capacity))
        for rows in sorted(batches)[:-1]:
            total.update(self.taken(rows, min(columns, capacity)))
        self.nbytes = dict(total)

    def fits(self, batches: Iterable[tuple[int, int]]) -> bool:
        """Whether it has the pages of batches with these numbers of rows and tokens."""
        total = Counter[Tier]()
        for rows, tokens in batches:
            total.update(self.taken(rows, tokens))
        return all(nbytes <= self.nbytes[tier] for tier, nbytes in total.items())

    def needs(self) -> list[Need]:
        """The pages, and the most that a batch whose rows move together takes of one layer before others give up
        theirs."""
        return [
            need
            for tier, nbytes in self.nbytes.items()
            for need in (
                Need(tier, "cache", "home", nbytes),
                Need(tier, "cache", "workspace", self._largest.largest_home(tier)),
            )
        ]


def cache_pool(
    layers: Sequence[Layer],
    policy: Policy,
    batches: Sequence[int],
    workload: Workload,
    dtype: torch.dtype,
    topology: Topology,
) -> CachePool | None:
    """The pool of a block with these batches; None if the policy reserves the cache of all tokens."""
    if not policy.reserves(workload.gen_len):
        return None
    passes, kinds = Passes.of(workload, policy), kinds_of_attention(layers)
    capacity = passes.capacity(workload.gen_len)

    def cache_of(rows: int) -> BatchCache:
        return batch_cache(kinds, policy, rows, capacity, dtype, topology)

    return CachePool(cache(cache_of), batches, passes.width + policy.reserve_new, capacity)
