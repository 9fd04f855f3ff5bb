"""Moves of shares between tiers, with capacities in percent of a class."""

from flexgen.policy import Policy, Tier
from flexgen.search.moves import traded, with_room

ROOM = 45


def short(policy):
    """The tiers that are too small if the GPU has room for 45 percent of one class."""
    return [Tier.GPU] if policy.weights.percent(Tier.GPU) + policy.cache.percent(Tier.GPU) > ROOM else []


def test_cache_takes_the_place_of_weights():
    policy = Policy(weights={"gpu": 42, "cpu": 58}, cache={"cpu": 100})
    assert with_room(policy, tuple(Tier), short) is policy
    moved = policy.replace(cache={"gpu": 10, "cpu": 90})
    found = with_room(moved, tuple(Tier), short)
    assert found == moved.replace(weights={"gpu": 35, "cpu": 65})
    assert with_room(moved, (), short) is None, "weights that are given stay"
    assert with_room(policy.replace(cache={"gpu": 50, "cpu": 50}), tuple(Tier), short) is None


def test_trades_of_cache_for_weights():
    policy = Policy(weights={"gpu": 42, "cpu": 58}, cache={"gpu": 3, "cpu": 97})
    found = [
        (one.cache.percent(Tier.GPU), one.weights.percent(Tier.GPU))
        for one in traded(policy, tuple(Tier), short)
    ]
    assert found == [(5, 40), (7, 38), (11, 34), (19, 26)]
