"""The requested and the achieved placement of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexgen.policy import Policy, Split, Tier


def placement_table(
    policy: Policy, weights: Mapping[Tier, float], batches: Sequence[int]
) -> dict[str, dict[Tier, tuple[float, float]]]:
    """`Report.placement` from the achieved percentages of the weights and the rows of each batch."""
    got = {
        "weights": weights,
        "cache": _rows(policy.cache, batches),
        "activations": _rows(policy.activations, batches),
    }
    return {
        what: {tier: (getattr(policy, what).percent(tier), achieved[tier]) for tier in Tier}
        for what, achieved in got.items()
    }


def _rows(split: Split, batches: Sequence[int]) -> dict[Tier, float]:
    """The percentage of the rows of a block on each tier."""
    rows = [split.rows(count) for count in batches]
    return {tier: 100 * sum(len(parts[tier]) for parts in rows) / sum(batches) for tier in Tier}
