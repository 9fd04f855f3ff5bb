"""Whether a plan fits a machine, and if not, what would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flexgen.errors import CapacityError
from flexgen.memory.plan import MemoryPlan
from flexgen.policy import Policy, Tier


def fitting_plan(
    plan: Callable[[Policy], MemoryPlan], policy: Policy, limits: Mapping[Tier, int | None]
) -> MemoryPlan:
    """The plan of `policy`, which is within `limits` (bytes by tier, None for no limit).

    Raises CapacityError otherwise, with a batch shape that would fit where there is one.
    """
    asked = plan(policy)
    if short := asked.shortage(limits):
        if smaller := largest_fitting(plan, policy, limits):
            shape = f"{smaller.gpu_batch_size} and num_gpu_batches = {smaller.num_gpu_batches}"
            raise CapacityError(f"{short}. It would fit with gpu_batch_size = {shape}")
        raise CapacityError(f"{short}. Put a larger share on a slower tier, up to disk = 100")
    return asked


def largest_fitting(
    plan: Callable[[Policy], MemoryPlan], policy: Policy, limits: Mapping[Tier, int | None]
) -> Policy | None:
    """`policy`, or where its plan is not within `limits` the same with as many fewer prompts in flight as it takes;
    None where not even one fits."""
    shapes = (policy, *_smaller(policy))
    return next((shape for shape in shapes if not plan(shape).shortage(limits)), None)


def _smaller(policy: Policy) -> Iterable[Policy]:
    """The policy with fewer prompts in flight: fewer batches first, then smaller ones."""
    for batches in range(policy.num_gpu_batches - 1, 0, -1):
        yield policy.replace(num_gpu_batches=batches)
    size = policy.gpu_batch_size
    while (size := size // 2) > 0:
        yield policy.replace(num_gpu_batches=1, gpu_batch_size=size)
