"""What each call of an opened model runs under: its policy, its order, and the plan of its memory."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flexgen.engine.auto import AutoPolicy, Chosen
from flexgen.errors import CapacityError
from flexgen.layout.fitting import fitting_plan, largest_fitting, with_fitting_chunk
from flexgen.layout.needs import Kept, MemoryPlan, Need
from flexgen.layout.placement import Placement
from flexgen.layout.plan import Target, plan_memory
from flexgen.memory.machine import Machine
from flexgen.models import Layer
from flexgen.policy import Policy
from flexgen.runtime.buffers import Buffers
from flexgen.runtime.in_use import InUse
from flexgen.schedule.orders import Slots, normal, overlap_multi_batch
from flexgen.workload import Workload


@dataclass(frozen=True)
class CallPlans:
    """The plans of one opened model, whose weights lie where they lie.

    slots: of the weights on their way, for every call. opened: what the model was opened with. auto: finds another
    policy for calls that are unlike it; None, or one that looks `once`, keeps to that of the opening.
    """

    layers: Sequence[Layer]
    placement: Placement
    machine: Machine
    slots: Slots
    opened: Chosen
    auto: AutoPolicy | None
    in_use: InUse
    kept: dict[Buffers, tuple[Need, ...]] = field(default_factory=dict)
    """Buffers that outlive calls, and what they need: the plans of other calls count it."""

    def of_weights(self) -> MemoryPlan:
        """What the weights take, before any call. Raises CapacityError where they do not fit."""
        return fitting_plan(self._plan_of(None), self.opened.policy, self.machine.limits())

    def of_call(
        self,
        workload: Workload,
        all_logits: bool = False,
        kept: Kept | None = None,
        whole_prompts: bool = False,
    ) -> tuple[Chosen, MemoryPlan]:
        """Policy and order of a call, and its plan with what its caller keeps, which fits the machine.

        Where whole prompts do not fit, the policy gets a `prefill_chunk` that does, unless the caller wants results
        of every position (`whole_prompts`).

        Raises CapacityError otherwise, with a batch shape that would fit where there is one; a policy that was
        searched for takes that shape.
        """
        plan, limits, chosen = self._plan_of(workload, all_logits, kept), self.machine.limits(), self.opened
        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workload, lambda policy: not plan(policy).shortage(limits))
            chosen = replace(chosen, policy=largest_fitting(plan, chosen.policy, limits) or chosen.policy)
        if whole_prompts:
            policy = chosen.policy.replace(prefill_chunk=0)
        else:
            policy = with_fitting_chunk(plan, chosen.policy, limits, workload.prompt_len)
        return replace(chosen, policy=policy), fitting_plan(plan, policy, limits)

    def of_one_block(self, workload: Workload, kept: Kept | None = None) -> tuple[Chosen, MemoryPlan]:
        """`of_call` for a call that runs as one block, of as many GPU batches as its rows need.

        A policy that was searched for takes smaller batches where that makes it fit. What is `kept` grows with the
        rows. Raises CapacityError where they do not fit, with the most rows that do.
        """
        plan, limits, chosen = self._plan_of(workload, kept=kept), self.machine.limits(), self.opened
        rows, halvings = workload.num_prompts, 1
        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workload, lambda policy: not plan(policy).shortage(limits))
            halvings = chosen.policy.gpu_batch_size.bit_length()
        shapes = [_one_block(chosen.policy, rows, halved) for halved in range(halvings)]
        shapes.append(with_fitting_chunk(plan, shapes[-1], limits, workload.prompt_len))
        fitting = next((policy for policy in shapes if not plan(policy).shortage(limits)), None)
        if fitting is None:
            most = self._most_rows(workload, kept, shapes[-1])
            raise CapacityError(
                f"{plan(shapes[-1]).shortage(limits)}. All {rows} rows of this call run in one block, because what "
                "chooses their ids (a logits processor or a stopping criterion of the caller) sees every row at "
                f"every step. Split it into calls of at most {most} rows"
            )
        topology, batches = self.machine.device.topology, fitting.num_gpu_batches
        # With more batches, a policy may ask for an order with more slots than there are.
        orders = (chosen.order, overlap_multi_batch.name, normal.name)
        slots = {name: topology.choose_order(name, fitting, batches).slots for name in orders}
        order = next(name for name in orders if slots[name].fit(self.slots))
        return Chosen(fitting, order), plan(fitting)

    def of_text(self, workload: Workload, buffers: Buffers) -> tuple[Chosen, MemoryPlan]:
        """`of_call` for calls that add to one text, in `buffers`: parts of it are computed after what is cached."""
        plan, limits, chosen = self._plan_of(workload, but=buffers), self.machine.limits(), self.opened
        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workload, lambda policy: not plan(policy).shortage(limits))
        # A part is shorter than the text: buffers are made for parts that follow others.
        most = max(min(self.layers[0].spec.chunk_tokens, workload.prompt_len - 1), 1)
        cut = chosen.policy.replace(prefill_chunk=min(chosen.policy.prefill_chunk or most, most))
        policy = with_fitting_chunk(plan, cut, limits, workload.prompt_len)
        return replace(chosen, policy=policy), fitting_plan(plan, policy, limits)

    def remember(self, buffers: Buffers, plan: MemoryPlan) -> None:
        """Count what buffers need that were planned for; nothing is taken yet."""
        weights = Counter({(n.tier, n.what, n.role): n.nbytes for n in self.of_weights().needs})
        needs = (replace(n, nbytes=n.nbytes - weights[n.tier, n.what, n.role]) for n in plan.needs)
        self.kept[buffers] = tuple(need for need in needs if need.nbytes > 0)

    def forget(self, buffers: Buffers) -> None:
        """Give kept buffers back, unless they belong to the process that this one is a fork of."""
        if not self.in_use.inherited:
            self.kept.pop(buffers, None)
            buffers.close()

    def forget_all(self) -> None:
        """Give all kept buffers back."""
        for buffers in list(self.kept):
            self.forget(buffers)

    def _most_rows(self, workload: Workload, kept: Kept | None, policy: Policy) -> int:
        """The most rows of a call in one block that fit. Raises CapacityError where not even one does."""
        limits = self.machine.limits()

        def plan_of(rows: int) -> Callable[[Policy], MemoryPlan]:
            def fewer(policy: Policy) -> list[Need]:
                needs = kept(policy) if kept else ()
                return [replace(need, nbytes=need.nbytes * rows // workload.num_prompts) for need in needs]

            return self._plan_of(replace(workload, num_prompts=rows), kept=fewer)

        def too_many(rows: int) -> bool:
            return bool(plan_of(rows)(_one_block(policy, rows)).shortage(limits))

        fitting_plan(plan_of(1), _one_block(policy, 1), limits)
        return bisect_left(range(1, workload.num_prompts), True, key=too_many)

    def _plan_of(
        self,
        workload: Workload | None,
        all_logits: bool = False,
        kept: Kept | None = None,
        but: Buffers | None = None,
    ) -> Callable[[Policy], MemoryPlan]:
        """Plans by policy, with what is kept of other calls; `but`: those buffers are what is planned."""
        device = self.machine.device
        target = Target(device.topology, self.slots, device.workspaces)
        others = [need for buffers, needs in self.kept.items() if buffers is not but for need in needs]

        def plan(policy: Policy) -> MemoryPlan:
            planned = plan_memory(self.layers, self.placement, policy, target, workload, all_logits)
            more = (*(kept(policy) if kept else ()), *(others if workload is not None else ()))
            return replace(planned, needs=(*planned.needs, *more)) if more else planned

        return plan


def _one_block(policy: Policy, rows: int, halved: int = 0) -> Policy:
    """The policy with batches enough for `rows` prompts, of a size that is `halved` so many times."""
    size = max(policy.gpu_batch_size >> halved, 1)
    return policy.replace(gpu_batch_size=size, num_gpu_batches=-(-rows // size))
