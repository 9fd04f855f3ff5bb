"""The lanes from each tier to the compute device and back."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.layout.pieces import PieceSizes
from flexgen.policy import Policy, Tier
from flexgen.results.trace import LaneName
from flexgen.schedule.orders import ORDERS, Order, order_for


@dataclass(frozen=True)
class Topology:
    """The link between host memory and device memory in each direction, or () if they are the same memory.

    pieces: the sizes of the pieces that move over the link and the disk.
    """

    to_device: tuple[LaneName, ...]
    from_device: tuple[LaneName, ...]
    pieces: PieceSizes = PieceSizes()

    @property
    def shares_host_memory(self) -> bool:
        """Whether the compute device computes in host memory. The GPU tier of a policy is stored there too."""
        return not self.to_device

    @property
    def device(self) -> Tier:
        """The tier of the compute device's memory."""
        return Tier.CPU if self.shares_host_memory else Tier.GPU

    def inward(self, tier: Tier) -> tuple[LaneName, ...]:
        """The lanes from `tier` to the compute device, in order, or () if the device uses its data in place."""
        match tier:
            case Tier.GPU:
                return ()
            case Tier.CPU:
                return self.to_device
            case Tier.DISK:
                return (LaneName.DISK_READ, *self.to_device)

    def outward(self, tier: Tier) -> tuple[LaneName, ...]:
        """The lanes from the compute device to `tier`, in order."""
        match tier:
            case Tier.GPU:
                return ()
            case Tier.CPU:
                return self.from_device
            case Tier.DISK:
                # Without a link, the host copies the data, because the disk needs whole, aligned blocks.
                return (*(self.from_device or (LaneName.HOST,)), LaneName.DISK_WRITE)

    def in_place(self, tier: Tier) -> bool:
        """Whether the compute device uses the data on `tier` in place."""
        return not self.inward(tier)

    def host_attends(self, policy: Policy) -> bool:
        """Whether the host computes attention over some rows for a compute device with separate memory."""
        return (
            not self.shares_host_memory and policy.attend_on == "cpu" and policy.cache.percent(Tier.GPU) < 100
        )

    def closes_up(self, policy: Policy) -> bool:
        """Whether rows move to the first places of a block when others have ended.

        The cache of a few rows is copied between two passes. So no cell computes a place without a row, and prompts
        enter in adjacent places. This needs prompts that enter in the places of single rows (`prefill_rows`), and a
        cache that is in place and on one tier.
        """
        on_one = any(policy.cache.percent(tier) == 100 for tier in Tier)
        return policy.prefill_rows > 0 and self.shares_host_memory and on_one

    def keeps_ids(self, table_is_gathered: bool) -> bool:
        """Whether ids chosen on the compute device feed its next token without a copy to the host.

        table_is_gathered: whether the host gathers the rows of the embedding table.
        """
        return not (self.shares_host_memory or table_is_gathered)

    def choose_order(self, name: str | None, policy: Policy, batches: int) -> Order:
        """The order of that name, or without a name, the policy's order for `batches` batches.

        If prompts enter in cells of their own (`prefill_rows`), a layer has several cells in most passes.
        """
        batches = max(batches, 2) if policy.prefill_rows else batches
        return ORDERS[name or order_for(policy.overlap, batches, self.host_attends(policy))]


SHARED = Topology((), ())
"""A compute device that computes in host memory."""

LINKED = Topology((LaneName.TO_DEVICE,), (LaneName.FROM_DEVICE,))
"""A compute device with separate memory behind a link."""
