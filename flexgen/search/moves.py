"""Moves shares of a policy between tiers: to make it fit, to fill a tier, and to try faster placements."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise

from flexgen.policy import Policy, Share, Split, Tier
from flexgen.search.linear import CLASSES

Short = Callable[[Policy], Collection[Tier]]
"""The tiers whose capacity a policy exceeds."""

_FILLING = 20.0, 5.0, 1.0
"""The percentages of the weights to move in one step to fill a tier."""
_SQUEEZING = 5.0
_TRADES = 2.0, 4.0, 8.0, 16.0
"""The percentages of the cache to move in the place of weights."""


def moves(policy: Policy, step: float, tiers: Sequence[Tier], fixed: Collection[str]) -> Iterator[Policy]:
    """Policies that differ from `policy` by one move to one of `tiers`, of `step` percent of a class or of one row of
    a batch. Classes that are `fixed` do not move."""
    for what in CLASSES:
        if what in fixed:
            continue
        split: Split = getattr(policy, what)
        row = 0 if what == "weights" else math.ceil(100 / policy.gpu_batch_size)
        for source in Tier:
            percent = min(max(step, row), split.percent(source))
            for target in tiers:
                if refused(policy, what, target):
                    continue
                if target is not source and percent:
                    yield policy.replace(**{what: _moved(split, source, target, percent)})


def refused(policy: Policy, what: str, tier: Tier) -> bool:
    """Whether `Policy` refuses this class of data on a tier."""
    if what == "cache":
        return tier is Tier.DISK and policy.lengths_differ
    return what == "activations" and tier is not Tier.GPU and policy.prefill_rows > 0


def filled(policy: Policy, tiers: Collection[Tier], short: Short) -> Policy:
    """`policy` with as many weights moved to faster tiers as fit, so that no tier is `short`."""
    ordered = [tier for tier in Tier if tier in tiers]
    for step in _FILLING:
        for n, target in enumerate(ordered):
            for source in reversed(ordered[n + 1 :]):
                while policy.weights.percent(source) >= step:
                    moved = policy.replace(weights=_moved(policy.weights, source, target, step))
                    if short(moved):
                        break
                    policy = moved
    return policy


def squeezed(policy: Policy, tiers: Collection[Tier], short: Short) -> Policy | None:
    """`policy` with weights moved to slower tiers until no tier is `short`, or None if that is impossible."""
    slower = dict(pairwise(tier for tier in Tier if tier in tiers))
    while lacking := short(policy):
        source = next(tier for tier in Tier if tier in lacking)
        percent = min(policy.weights.percent(source), _SQUEEZING)
        if source not in slower or not percent:
            return None
        policy = policy.replace(weights=_moved(policy.weights, source, slower[source], percent))
    return policy


def with_room(policy: Policy, tiers: Collection[Tier], short: Short) -> Policy | None:
    """`policy`, or if it does not fit, with weights on slower ones of `tiers`; None if that is impossible."""
    if not short(policy):
        return policy
    room = squeezed(policy, tiers, short)
    return room and filled(room, tiers, short)


def traded(policy: Policy, tiers: Collection[Tier], short: Short) -> Iterator[Policy]:
    """`policy` with more of its cache on the GPU, in the place of weights. Which of them saves more depends on how
    well attention on the host overlaps, which a model of few layers does not show."""
    for percent in _TRADES:
        if policy.cache.percent(Tier.CPU) >= percent:
            cache = _moved(policy.cache, Tier.CPU, Tier.GPU, percent)
            if room := with_room(policy.replace(cache=cache), tiers, short):
                yield room


def _moved(split: Split, source: Tier, target: Tier, percent: float) -> dict[Tier, Share]:
    """`split` with `percent` moved from one tier to another, in the codec of the data that is already there."""
    codec = (split[target] if split.percent(target) else split[source]).codec
    moved = {tier: split[tier] for tier in Tier if split.percent(tier)}
    moved[source] = Share(split.percent(source) - percent, split[source].codec)
    moved[target] = Share(min(split.percent(target) + percent, 100.0), codec)
    return {tier: share for tier, share in moved.items() if share.percent}
