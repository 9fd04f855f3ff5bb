"""Chooses the policy, the order and the memory plan of each call of an opened model."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce

from flexgen.engine.auto import AutoPolicy, Chosen
from flexgen.errors import CapacityError, RequestError
from flexgen.layout.fitting import fitting_plan, largest_fitting, with_fitting_chunk
from flexgen.layout.needs import ExtraNeeds, MemoryPlan, Need
from flexgen.layout.placement import Placement
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.prefix import shared_tokens, shares
from flexgen.layout.weights import weight_layouts
from flexgen.memory.machine import Machine
from flexgen.models import Layer
from flexgen.policy import Policy
from flexgen.runtime.buffers import Buffers
from flexgen.runtime.in_use import InUse
from flexgen.runtime.prefix_groups import BlockPasses, PrefixGroup, covering, one_group, prefix_groups
from flexgen.runtime.request import Request
from flexgen.schedule.orders import Slots, normal, overlap_multi_batch
from flexgen.workload import Workload

_PASS_IN_PLACE = 64
"""Positions of a pass. With fewer rows, products of matrices take about as long."""
_PASS_THAT_LOADS = 8_192
"""Positions that a device computes while all weights arrive once: 2000 to 8000 for a link of 12 to 25 GB/s and 50 to
100 TFLOPS."""


@dataclass(frozen=True)
class Wanted:
    """What a call asks for besides the newest ids of its rows.

    all_logits: whether the head computes every position of the prompts.
    whole_prompts: whether the caller needs the results of all positions, so that prompts have no parts.
    by_place: whether prompts may enter in the places of single rows (`Policy.prefill_rows`). Otherwise whole batches
        of prompts are computed together.
    extra_needs: memory that the caller keeps for the call.
    """

    all_logits: bool = False
    whole_prompts: bool = False
    by_place: bool = False
    extra_needs: ExtraNeeds | None = None

    def policy(self, chosen: Policy) -> Policy:
        """The policy of the call if `chosen` is the model's."""
        chunk = 0 if self.whole_prompts else chosen.prefill_chunk
        return chosen.replace(prefill_chunk=chunk, prefill_rows=chosen.prefill_rows if self.by_place else 0)


@dataclass(frozen=True)
class CallPlans:
    """The plans of one opened model, whose weights stay in place.

    slots: the slots that the model was opened with; all calls use them.
    opened: the policy and the order that the model was opened with.
    auto: finds policies for calls of other workloads. None, or an `AutoPolicy` with `once`, keeps the opening's.
    retained: buffers that stay allocated between calls, and their needs. The plans of other calls count them.
    """

    layers: Sequence[Layer]
    placement: Placement
    machine: Machine
    slots: Slots
    opened: Chosen
    auto: AutoPolicy | None
    in_use: InUse
    retained: dict[Buffers, tuple[Need, ...]] = field(default_factory=dict)

    @cached_property
    def pass_positions(self) -> float:
        """The number of positions that a pass computes in the time that it takes for any number of rows.

        It is a rough estimate, from the share of the weights that move to the compute device in each pass.
        """
        layouts = weight_layouts(self.layers, self.placement, self.machine.device.topology)
        moved = sum(layout.nbytes for layout in layouts) / max(sum(self.placement.nbytes.values()), 1)
        return _PASS_IN_PLACE + _PASS_THAT_LOADS * moved

    def of_weights(self) -> MemoryPlan:
        """The plan of the weights alone, before any call. Raises CapacityError if they do not fit."""
        return fitting_plan(self._plan_of(None), self.opened.policy, self.machine.limits())

    def of_call(self, workloads: Sequence[Workload], wanted: Wanted) -> tuple[Chosen, MemoryPlan]:
        """The policy and the order of a call, and its plan, which fits the machine and counts the caller's needs.

        workloads: those of the call's groups of prompts, which run one after another. A policy that is searched for
            is that of the first.

        If whole prompts do not fit, the policy gets a `prefill_chunk` that fits, unless the caller needs the results
        of all positions. A policy that was searched for gets a smaller batch shape if it has to.

        Raises CapacityError if the call does not fit, with a batch shape that fits if there is one.
        """
        plans = [self._plan_of(workload, wanted.all_logits, wanted.extra_needs) for workload in workloads]
        limits, chosen = self.machine.limits(), self.opened

        def plan(policy: Policy) -> MemoryPlan:
            return reduce(MemoryPlan.or_larger, (plan(policy) for plan in plans))

        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workloads[0], lambda policy: not plan(policy).shortage(limits))
            # Whole prompts, or whole batches of them, may need more memory than the policy that was found.
            fitting = largest_fitting(plan, wanted.policy(chosen.policy), limits)
            chosen = replace(chosen, policy=fitting or chosen.policy)
        policy = wanted.policy(chosen.policy)
        if not wanted.whole_prompts:
            longest = max(workload.prompt_len for workload in workloads)
            policy = with_fitting_chunk(plan, policy, limits, longest)
        elif plan(policy).shortage(limits):
            policy = policy.replace(share_prefix=False)
        return replace(chosen, policy=policy), fitting_plan(plan, policy, limits)

    def of_groups(
        self, request: Request, workload: Workload, wanted: Wanted
    ) -> tuple[list[PrefixGroup], Chosen, MemoryPlan]:
        """`of_call` for a request with this workload, and its prompts in groups with their prefixes.

        If the prefixes of several groups do not fit, all prompts are one group. The block size that decides which
        groups are worth their passes is that of the policy that the model was opened with.
        """
        policy, stretches = self.opened.policy, self.layers[0].spec.stretches(workload.capacity)
        if shares(policy) and not stretches:
            passes = BlockPasses(policy.block_size, workload.gen_len, self.pass_positions)
            groups = prefix_groups(request, shared_tokens(workload, policy), passes)
            if len(groups) > 1:
                with suppress(CapacityError, RequestError):
                    chosen, plan = self.of_call(covering(groups, request, workload.gen_len), wanted)
                    if shares(chosen.policy):
                        return groups, chosen, plan
        chosen, plan = self.of_call([workload], wanted)
        return [one_group(request, shared_tokens(workload, chosen.policy))], chosen, plan

    def of_one_block(
        self, request: Request, workload: Workload, extra_needs: ExtraNeeds | None = None
    ) -> tuple[list[PrefixGroup], Chosen, MemoryPlan]:
        """`of_groups` for a call that runs as one block; its rows set the number of GPU batches.

        A policy that was searched for gets smaller batches if it has to. `extra_needs` grow with the rows.

        Raises CapacityError if the rows do not fit, with the maximum number of rows that fit.
        """
        plan, limits, chosen = (
            self._plan_of(workload, extra_needs=extra_needs),
            self.machine.limits(),
            self.opened,
        )
        rows, halvings = workload.num_prompts, 1
        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workload, lambda policy: not plan(policy).shortage(limits))
            halvings = chosen.policy.gpu_batch_size.bit_length()
        shapes = [_one_block(chosen.policy, rows, halved) for halved in range(halvings)]
        shapes.append(with_fitting_chunk(plan, shapes[-1], limits, workload.prompt_len))
        fitting = next((policy for policy in shapes if not plan(policy).shortage(limits)), None)
        if fitting is None:
            most = self._most_rows(workload, extra_needs, shapes[-1])
            raise CapacityError(
                f"{plan(shapes[-1]).shortage(limits)}. All {rows} rows of this call run in one block, because its "
                "choice of ids (a logits processor or a stopping criterion of the caller) sees every row at "
                f"every step. Split it into calls of at most {most} rows"
            )
        topology, batches = self.machine.device.topology, fitting.num_gpu_batches
        # With more batches, the policy's own order may need more slots than there are.
        orders = (chosen.order, overlap_multi_batch.name, normal.name)
        slots = {name: topology.choose_order(name, fitting, batches).slots for name in orders}
        order = next(name for name in orders if slots[name].fit(self.slots))
        return [one_group(request, shared_tokens(workload, fitting))], Chosen(fitting, order), plan(fitting)

    def of_text(self, workload: Workload, buffers: Buffers) -> tuple[Chosen, MemoryPlan]:
        """`of_call` for calls that extend one text, whose cache is in `buffers`."""
        plan, limits, chosen = self._plan_of(workload, but=buffers), self.machine.limits(), self.opened
        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workload, lambda policy: not plan(policy).shortage(limits))
        # Chunks are shorter than the text, so that the buffers are made for chunks that follow cached tokens.
        most = max(min(self.layers[0].spec.chunk_tokens, workload.prompt_len - 1), 1)
        chunk = min(chosen.policy.prefill_chunk or most, most)
        cut = chosen.policy.replace(prefill_chunk=chunk, prefill_rows=0, reserve_new=0)
        policy = with_fitting_chunk(plan, cut, limits, workload.prompt_len)
        return replace(chosen, policy=policy), fitting_plan(plan, policy, limits)

    def remember(self, buffers: Buffers, plan: MemoryPlan) -> None:
        """Count the needs of buffers that `plan` was made for. It allocates nothing."""
        weights = Counter({(n.tier, n.what, n.role): n.nbytes for n in self.of_weights().needs})
        needs = (replace(n, nbytes=n.nbytes - weights[n.tier, n.what, n.role]) for n in plan.needs)
        self.retained[buffers] = tuple(need for need in needs if need.nbytes > 0)

    def forget(self, buffers: Buffers) -> None:
        """Free retained buffers, unless they belong to the parent of this forked process."""
        if not self.in_use.inherited:
            self.retained.pop(buffers, None)
            buffers.close()

    def forget_all(self) -> None:
        """Free all retained buffers."""
        for buffers in list(self.retained):
            self.forget(buffers)

    def _most_rows(self, workload: Workload, extra_needs: ExtraNeeds | None, policy: Policy) -> int:
        """The maximum number of rows that fit in one block. Raises CapacityError if not even one row fits."""
        limits = self.machine.limits()

        def plan_of(rows: int) -> Callable[[Policy], MemoryPlan]:
            def fewer(policy: Policy) -> list[Need]:
                needs = extra_needs(policy) if extra_needs else ()
                return [replace(need, nbytes=need.nbytes * rows // workload.num_prompts) for need in needs]

            return self._plan_of(replace(workload, num_prompts=rows), extra_needs=fewer)

        def too_many(rows: int) -> bool:
            return bool(plan_of(rows)(_one_block(policy, rows)).shortage(limits))

        fitting_plan(plan_of(1), _one_block(policy, 1), limits)
        return bisect_left(range(1, workload.num_prompts), True, key=too_many)

    def _plan_of(
        self,
        workload: Workload | None,
        all_logits: bool = False,
        extra_needs: ExtraNeeds | None = None,
        but: Buffers | None = None,
    ) -> Callable[[Policy], MemoryPlan]:
        """A function from a policy to its plan, which counts the retained buffers of other calls, except `but`."""
        device = self.machine.device
        target = Target(device.topology, self.slots, device.workspaces)
        others = [need for buffers, needs in self.retained.items() if buffers is not but for need in needs]

        def plan(policy: Policy) -> MemoryPlan:
            planned = plan_memory(self.layers, self.placement, policy, target, workload, all_logits)
            more = (*(extra_needs(policy) if extra_needs else ()), *(others if workload is not None else ()))
            return replace(planned, needs=(*planned.needs, *more)) if more else planned

        return plan


def _one_block(policy: Policy, rows: int, halved: int = 0) -> Policy:
    """The policy with enough batches for `rows` prompts, which reserves all of their cache, and a batch size that is
    halved `halved` times."""
    size = max(policy.gpu_batch_size >> halved, 1)
    shape = {"gpu_batch_size": size, "num_gpu_batches": -(-rows // size)}
    return policy.replace(**shape, prefill_rows=0, reserve_new=0)
