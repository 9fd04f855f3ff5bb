"""The bytes that a call needs on each tier, and their comparison with the limits of the tiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexgen.layout.limits import Limits
from flexgen.layout.weight_slots import SlotSizes
from flexgen.policy import Policy, Tier
from flexgen.units import format_bytes


@dataclass(frozen=True)
class Need:
    """The bytes that one class of data needs on a tier in one role."""

    tier: Tier
    what: str  # weights, cache, activations, libraries, logits
    role: str  # home, slots, staging, workspace
    nbytes: int


ExtraNeeds = Callable[[Policy], Sequence[Need]]
"""The needs of the results that a caller keeps, under a policy."""


@dataclass(frozen=True)
class Shortage:
    """Needs on one tier, or on two tiers together, that exceed the limit in bytes."""

    tiers: tuple[Tier, ...]
    limit: int
    needs: tuple[Need, ...]

    @property
    def total(self) -> int:
        return sum(need.nbytes for need in self.needs)

    @property
    def where(self) -> str:
        if len(self.tiers) > 1:
            return f"{' and '.join(self.tiers)} tiers together"
        return f"{self.tiers[0]} tier"


@dataclass(frozen=True)
class MemoryPlan:
    """All needs of one call, with the sizes of the weight slots."""

    needs: tuple[Need, ...]
    weight_slots: SlotSizes

    def on(self, tier: Tier, what: str | None = None) -> int:
        """Bytes on `tier`, for one class of data or for all."""
        return sum(n.nbytes for n in self.needs if n.tier is tier and what in (None, n.what))

    def workspace(self, tier: Tier) -> int:
        """Bytes on `tier` that are allocated only while the computation runs."""
        return sum(n.nbytes for n in self.needs if n.tier is tier and n.role == "workspace")

    def or_larger(self, other: MemoryPlan) -> MemoryPlan:
        """The plan of a part of a call that runs before or after the part of `other`: the larger of each two needs.
        Both are plans of the same weights."""
        keys = dict.fromkeys((n.tier, n.what, n.role) for n in (*self.needs, *other.needs))
        mine, theirs = (Counter({(n.tier, n.what, n.role): n.nbytes for n in p.needs}) for p in (self, other))
        return replace(self, needs=tuple(Need(*key, max(mine[key], theirs[key])) for key in keys))

    @property
    def by_tier(self) -> dict[Tier, int]:
        return {tier: self.on(tier) for tier in Tier}

    def shortage(self, limits: Mapping[Tier, int | None]) -> str:
        """A message with the need that exceeds its limit (bytes by tier, None for no limit), or "" if all fit."""
        for short in self.shortages(limits):
            largest = sorted((n for n in short.needs if n.nbytes), key=lambda need: -need.nbytes)
            parts = ", ".join(f"{n.what} {n.role} {format_bytes(n.nbytes)}" for n in largest)
            in_all = ", ".join(f"{t} {format_bytes(count)}" for t, count in self.by_tier.items())
            return (
                f"the policy needs {format_bytes(short.total)} on the {short.where}, which has "
                f"{format_bytes(short.limit)} ({parts}); in all it needs {in_all}"
            )
        return ""

    def shortages(self, limits: Mapping[Tier, int | None]) -> list[Shortage]:
        """All limits that the needs exceed. `Limits` may have a limit for two tiers together.

        Weights on disk are excluded: their files already exist, or are checked before they are written.
        """
        bounds: list[tuple[tuple[Tier, ...], int | None]] = [((tier,), limits.get(tier)) for tier in Tier]
        if isinstance(limits, Limits):
            bounds.append(((Tier.GPU, Tier.CPU), limits.host))
        found = []
        for tiers, limit in bounds:
            needs = tuple(
                n for n in self.needs if n.tier in tiers and (n.tier, n.what) != (Tier.DISK, "weights")
            )
            if limit is not None and sum(n.nbytes for n in needs) > limit:
                found.append(Shortage(tiers, limit, needs))
        return found
