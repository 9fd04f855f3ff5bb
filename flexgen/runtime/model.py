"""The state of an opened model that all its calls share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from flexgen.memory.lanes import Lanes
from flexgen.memory.lookup import RowTable
from flexgen.memory.machine import Machine
from flexgen.memory.weights import WeightSlots
from flexgen.models import Layer
from flexgen.policy import Policy
from flexgen.runtime.in_use import InUse
from flexgen.schedule.orders import Order, Slots


@dataclass(frozen=True)
class Model:
    """An opened model, shared by all calls.

    `table`: the embedding table, if its rows are gathered at home. `in_use`: the lock of the running call.
    """

    layers: tuple[Layer, ...]
    dtype: torch.dtype
    policy: Policy
    machine: Machine
    weights: WeightSlots
    lanes: Lanes
    slots: Slots
    order: str | None = None
    table: RowTable | None = None
    in_use: InUse = field(default_factory=InUse, compare=False)

    @property
    def feeds_ids(self) -> bool:
        """Whether new ids feed the next token on the device, if the order allows it. Guesses are made on the host."""
        return not self.policy.lengths_differ and self.machine.device.topology.keeps_ids(
            table_is_gathered=self.table is not None
        )

    def order_of(self, batches: int) -> Order:
        """The order for a block of `batches` batches."""
        return self.machine.device.topology.choose_order(self.order, self.policy, batches)
