"""The subject of a prediction or a search: a model, a machine and a workload."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexgen.errors import RequestError, ScheduleError, shown
from flexgen.layout.prefix import sharing
from flexgen.models import ModelSpec
from flexgen.policy import Policy
from flexgen.predict.hardware import Hardware
from flexgen.schedule.orders import ORDERS, Order, unknown_order
from flexgen.workload import Workload


@dataclass(frozen=True)
class Job:
    """A workload of one model on one machine. `order`: the name of the order; None is the policy's own."""

    spec: ModelSpec
    hardware: Hardware
    workload: Workload
    dtype: torch.dtype
    order: str | None = None

    @classmethod
    def checked(
        cls,
        spec: ModelSpec,
        hardware: Hardware,
        workload: Workload,
        dtype: str = "auto",
        order: str | None = None,
    ) -> Job:
        """The job, after checks.

        dtype: a name, or "auto", which is the checkpoint's dtype if the machine has products for it.
        order: the name of the order; None is the policy's own.

        Raises RequestError (invalid lengths or dtype) and ScheduleError (an unknown order).
        """
        if order is not None and order not in ORDERS:
            raise ScheduleError(unknown_order(order))
        if workload.capacity > spec.longest_text:
            raise RequestError(
                f"prompt_len {workload.prompt_len} + gen_len {workload.gen_len} exceed the {spec.max_positions} "
                f"positions of {spec.name}: shorten one of them"
            )
        name = hardware.dtype_for(_name(spec.dtype)) if dtype == "auto" else dtype
        if name not in hardware.products:
            known = ", ".join(hardware.products)
            raise RequestError(
                f"dtype {shown(name)} has no figures for {shown(hardware.name)}; use one of {known}, or 'auto'"
            )
        return cls(spec, hardware, sharing(spec, workload), getattr(torch, name), order)

    @property
    def dtype_name(self) -> str:
        """The name of the dtype in `Hardware`, such as "float16"."""
        return _name(self.dtype)

    def for_workload(self, workload: Workload) -> Job:
        """Another workload of the same model on the same machine. Raises RequestError as `checked` does."""
        return Job.checked(self.spec, self.hardware, workload, self.dtype_name, self.order)

    def order_for(self, policy: Policy, batches: int | None = None) -> Order:
        """The order in which a block of `batches` GPU batches runs; None is a full block."""
        batches = policy.num_gpu_batches if batches is None else batches
        return self.hardware.topology.choose_order(self.order, policy, batches)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
