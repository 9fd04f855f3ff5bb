"""Checks whether a plan fits a machine, and finds a policy that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain

from flexgen.errors import CapacityError, PolicyError
from flexgen.layout.needs import MemoryPlan, Shortage
from flexgen.policy import Policy, Tier
from flexgen.units import format_bytes

Limits = Mapping[Tier, int | None]
Plan = Callable[[Policy], MemoryPlan]

_SMALLEST_CHUNK = 32
"""Tokens of a prompt. Each part loads all weights again: with smaller parts, a prefill is as slow as a decode."""

_SMALL = 32
"""If no half, quarter, ... of a batch fits, all batch sizes up to this one are tried: rows are rounded to tiers."""


def fitting_plan(plan: Plan, policy: Policy, limits: Limits) -> MemoryPlan:
    """The plan of `policy`, if it is within `limits` (bytes by tier, None for no limit).

    Otherwise raises CapacityError, with a change of the policy that fits, or with the minimum bytes if there is none.
    """
    asked = plan(policy)
    if short := asked.shortage(limits):
        raise CapacityError(f"{short}. {_advice(plan, policy, limits)}")
    return asked


def parts_of(prompt_len: int) -> Iterator[int]:
    """Sizes of prompt parts in tokens: halves, quarters ... of a prompt, down to `_SMALLEST_CHUNK`."""
    chunk = prompt_len
    while chunk > _SMALLEST_CHUNK:
        chunk = max(-(-chunk // 2), _SMALLEST_CHUNK)
        yield chunk


def with_fitting_chunk(plan: Plan, policy: Policy, limits: Limits, prompt_len: int) -> Policy:
    """`policy` if its plan is within `limits`, else `policy` with the largest `prefill_chunk` whose plan is: a half,
    a quarter ... of the prompts or of its present chunk.

    If none of them fits, the same without a shared prefix, because its slots may be too large. Returns `policy` if
    nothing fits.
    """
    chunks = (policy.prefill_chunk, *parts_of(policy.prefill_chunk or prompt_len))
    cuts = [policy.replace(prefill_chunk=n) for n in chunks]
    apart = (cut.replace(share_prefix=False) for cut in cuts if cut.share_prefix)
    return next((cut for cut in chain(cuts, apart) if not plan(cut).shortage(limits)), policy)


def largest_fitting(plan: Plan, policy: Policy, limits: Limits) -> Policy | None:
    """`policy` if its plan is within `limits`, else `policy` with fewer prompts in flight: first with fewer batches,
    then with smaller ones. None if not even one prompt fits.

    The number of plans grows with the logarithm of the number of batches and of their size.
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
    """The fix for an error message: a shape or split that fits, or else advice that can remove the shortage."""
    if shape := largest_fitting(plan, policy, limits):
        return (
            f"It would fit with gpu_batch_size = {shape.gpu_batch_size} and "
            f"num_gpu_batches = {shape.num_gpu_batches}"
        )
    least = policy.replace(gpu_batch_size=1, num_gpu_batches=1)
    # Prompts that enter in cells of their own need all activations on the GPU tier.
    classes = ("cache",) if policy.prefill_rows else ("cache", "activations")
    for tier in (Tier.CPU, Tier.DISK, Tier.GPU):
        with suppress(PolicyError):  # a policy may refuse a cache on disk
            moved = least.replace(**{what: {tier: 100} for what in classes})
            if not plan(moved).shortage(limits):
                homes = " and ".join(f"{what} = {{ {tier} = 100 }}" for what in classes)
                return f"It would fit with gpu_batch_size = 1, num_gpu_batches = 1, {homes}"
    return ". ".join(_remedy(short, policy) for short in plan(least).shortages(limits))


def _remedy(short: Shortage, policy: Policy) -> str:
    """The minimum need if not even one prompt fits, and a way to lower it or to raise the limit."""
    homes = sum(n.nbytes for n in short.needs if (n.what, n.role) == ("weights", "home"))
    if short.tiers == (Tier.DISK,):
        fix = "free space in offload_dir, choose a directory on a larger disk, or put a smaller share on disk"
    elif short.total - homes <= short.limit:
        fix = "put a larger share of the weights on a slower tier when you open the model"
    else:
        halves = "" if policy.sep_layer else "set sep_layer = true, "
        fix = (
            f"the needs without the homes of the weights exceed {format_bytes(short.limit)} for all shares of the "
            f"weights: {halves}shorten the prompts or use a larger memory"
        )
    return (
        f"At least {format_bytes(short.total)} are needed on the {short.where}, one prompt at a time: {fix}"
    )
