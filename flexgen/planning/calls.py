"""What each call of an opened model runs under: its policy, its order, and the plan of its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from flexgen.memory.fitting import fitting_plan, largest_fitting
from flexgen.memory.machine import Machine
from flexgen.memory.needs import Kept, MemoryPlan
from flexgen.memory.placement import Placement
from flexgen.memory.plan import plan_memory
from flexgen.models import Layer
from flexgen.orders import Slots
from flexgen.planning.auto import AutoPolicy, Chosen
from flexgen.policy import Policy
from flexgen.workload import Workload


@dataclass(frozen=True)
class CallPlans:
    """The plans of one opened model, whose weights lie where they lie.

    slots: of the weights on their way, for every call. opened: what the model was opened with. auto: finds another
    policy for calls that are unlike it; None, or one that looks `once`, keeps to that of the opening.
    """

    layers: Sequence[Layer]
    placement: Placement
    dtype: torch.dtype
    machine: Machine
    slots: Slots
    opened: Chosen
    auto: AutoPolicy | None

    def of_weights(self) -> MemoryPlan:
        """What the weights take, before any call. Raises CapacityError where they do not fit."""
        return fitting_plan(self._plan_of(None), self.opened.policy, self.machine.limits())

    def of_call(
        self, workload: Workload, all_logits: bool = False, kept: Kept | None = None
    ) -> tuple[Chosen, MemoryPlan]:
        """Policy and order of a call, and its plan with what its caller keeps, which fits the machine.

        Raises CapacityError otherwise, with a batch shape that would fit where there is one; a policy that was
        searched for takes that shape.
        """
        plan, limits, chosen = self._plan_of(workload, all_logits, kept), self.machine.limits(), self.opened
        if self.auto is not None and not self.auto.once:
            chosen = self.auto.for_call(workload, lambda policy: not plan(policy).shortage(limits))
            chosen = replace(chosen, policy=largest_fitting(plan, chosen.policy, limits) or chosen.policy)
        return chosen, fitting_plan(plan, chosen.policy, limits)

    def _plan_of(
        self, workload: Workload | None, all_logits: bool = False, kept: Kept | None = None
    ) -> Callable[[Policy], MemoryPlan]:
        shared = self.machine.device.shares_host_memory

        def plan(policy: Policy) -> MemoryPlan:
            planned = plan_memory(
                self.layers, self.placement, policy, self.dtype, shared, workload, all_logits, self.slots
            )
            return replace(planned, needs=(*planned.needs, *kept(policy))) if kept else planned

        return plan
