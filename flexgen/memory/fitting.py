"""Whether a plan fits a machine, and if not, what would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from flexgen.errors import CapacityError
from flexgen.memory.plan import MemoryPlan
from flexgen.policy import Policy, Tier
from flexgen.units import format_bytes

Limits = Mapping[Tier, int | None]
Plan = Callable[[Policy], MemoryPlan]

_SMALL = 32
"""Batch sizes that are all tried where no half, quarter, ... fits: rounding of rows to tiers can favour any of them."""


def fitting_plan(plan: Plan, policy: Policy, limits: Limits) -> MemoryPlan:
    """The plan of `policy`, which is within `limits` (bytes by tier, None for no limit).

    Raises CapacityError otherwise, with a change of the policy that `plan` accepts where there is one, and else with
    the least that is needed.
    """
    asked = plan(policy)
    if short := asked.shortage(limits):
        raise CapacityError(f"{short}. {_advice(plan, policy, limits)}")
    return asked


def largest_fitting(plan: Plan, policy: Policy, limits: Limits) -> Policy | None:
    """`policy` if its plan is within `limits`, else the same with fewer prompts in flight: first with fewer batches,
    then with smaller ones. None where not even one prompt fits.

    Takes a number of plans that grows with the logarithm of the batches and of their size.
    """

    def fits(shape: Policy) -> bool:
        return not plan(shape).shortage(limits)

    if fits(policy):
        return policy
    one = policy.replace(num_gpu_batches=1)
    if fits(one):
        most, too_many = 1, policy.num_gpu_batches
        while too_many - most > 1:
            middle = (most + too_many) // 2
            if fits(policy.replace(num_gpu_batches=middle)):
                most = middle
            else:
                too_many = middle
        return policy.replace(num_gpu_batches=most)
    return next(filter(fits, (one.replace(gpu_batch_size=size) for size in _smaller(policy))), None)


def _smaller(policy: Policy) -> Iterator[int]:
    size = policy.gpu_batch_size
    while (size := size // 2) > 0:
        yield size
    yield from range(min(policy.gpu_batch_size - 1, _SMALL), 0, -1)


def _advice(plan: Plan, policy: Policy, limits: Limits) -> str:
    """What to change. Shapes and splits were tried; other advice is given only where it can remove the shortage."""
    if shape := largest_fitting(plan, policy, limits):
        return (
            f"It would fit with gpu_batch_size = {shape.gpu_batch_size} and "
            f"num_gpu_batches = {shape.num_gpu_batches}"
        )
    least = policy.replace(gpu_batch_size=1, num_gpu_batches=1)
    for tier in (Tier.CPU, Tier.DISK, Tier.GPU):
        moved = least.replace(cache={tier: 100}, activations={tier: 100})
        if not plan(moved).shortage(limits):
            return (
                f"It would fit with gpu_batch_size = 1, num_gpu_batches = 1, cache = {{ {tier} = 100 }} and "
                f"activations = {{ {tier} = 100 }}"
            )
    return _least(plan(least), limits)


def _least(smallest: MemoryPlan, limits: Limits) -> str:
    """What is needed with one prompt at a time, and how each tier that is too small can be relieved."""
    words = []
    for tier, (total, limit) in smallest.exceeded(limits).items():
        need = f"At least {format_bytes(total)} are needed on the {tier} tier, one prompt at a time"
        homes = sum(n.nbytes for n in smallest.needs if (n.tier, n.what, n.role) == (tier, "weights", "home"))
        if tier is Tier.DISK:
            fix = "free space in offload_dir or choose a directory on a larger disk"
        elif total - homes <= limit:
            fix = f"open the model with a smaller share of its weights on the {tier} tier"
        else:
            fix = (
                f"slots, staging and workspace alone exceed its {format_bytes(limit)}, whatever the shares of the "
                "policy: shorten the prompts, set sep_layer = true, or use more memory"
            )
        words.append(f"{need}: {fix}")
    return ". ".join(words)
