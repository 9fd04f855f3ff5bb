"""Rows of the embedding table for the ids of each cell of the first layer, gathered where the table lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flexgen.layout.moves import Kind
from flexgen.layout.plan import SLOTS
from flexgen.memory.lookup import RowTable
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.memory.transfer import Chains, bind


class Lookup:
    """The rows that the cells on their way look up, each row once, and for each id its row among them.

    To the layer they are a table: a smaller one, with ids that count in it. `tokens`: ids of the largest batch.
    """

    @whole_or_closed
    def __init__(
        self, table: RowTable, tokens: int, dtype: torch.dtype, machine: Machine, slots: int = SLOTS
    ) -> None:
        self.name = table.weight.name
        self._table = table
        self._sizes = sizes = table.sizes(tokens)
        self._layout = table.layout(tokens)
        self._codec = table.codec
        self._device = machine.device
        self._shared = machine.device.shares_host_memory
        self._taken = Taken()
        memory = machine.device.memory
        self._slots = [self._take(memory, sizes.slot) for _ in range(slots)]
        # Where nothing crosses a link, rows are gathered straight into the slot.
        self._staging = (
            self._slots if self._shared else [self._take(machine.host, sizes.staging) for _ in range(slots)]
        )
        self._scratch = self._take(machine.host, sizes.scratch, copied_by_device=False)
        self._decoded = self._take(memory, sizes.decoded)
        # Rows that were gathered last, and rows that are on the device, by slot.
        self._gathered = [0] * slots
        self._there = self._gathered if self._shared else [0] * slots
        shape = (sizes.rows, table.weight.shape[1])
        kept = [self._decoded] * slots if self._codec else [slot[sizes.lead :] for slot in self._slots]
        self._tables = [tensor_at(buffer, 0, shape, dtype) for buffer in kept]

    def _take(self, store: Store, nbytes: int, copied_by_device: bool = True) -> Tensor:
        return self._taken.buffer(store, nbytes, "rows of the embedding table", copied_by_device)

    def close(self) -> None:
        """Give back all memory."""
        self._taken.close()

    def load(self, ids: Tensor, slot: int) -> Chains:
        """The work that brings the rows of `ids`, which lie in host memory when it begins, to the device."""
        gather, bring = partial(self._gather, ids, slot), partial(self._bring, ids.numel(), slot)
        return bind(self._layout.load(ids.numel()), lambda _, m: gather if m.kind is Kind.GATHER else bring)

    def _gather(self, ids: Tensor, slot: int) -> None:
        rows, index = torch.unique(ids, return_inverse=True)
        target = self._staging[slot]
        self._index(target, ids.shape).copy_(index)
        self._table.gather(rows, target[self._sizes.lead :], self._scratch)
        self._gathered[slot] = len(rows)

    def _bring(self, ids: int, slot: int) -> None:
        # At most as many rows as ids, whatever was gathered: a lane that is timed alone brings old ones.
        count, lead = min(self._gathered[slot], ids), self._sizes.lead
        source, target = self._staging[slot], self._slots[slot]
        for begin, nbytes in ((0, ids * torch.int64.itemsize), (lead, self._table.nbytes(count))):
            self._device.to_device(target[begin : begin + nbytes], source[begin : begin + nbytes])
        self._there[slot] = count

    def take(self, shape: Sequence[int], slot: int) -> tuple[Tensor, Tensor]:
        """(x of `shape`, table) on the compute device, once `load` is done; x counts in the table's rows.

        Encoded rows are decoded here, as part of the computation.
        """
        if self._codec is not None and (count := self._there[slot]):
            kept = self._slots[slot][self._sizes.lead :][: self._table.nbytes(count)]
            self._codec.decode(kept, self._tables[slot][:count])
        return self._index(self._slots[slot], shape), self._tables[slot]

    def _index(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor_at(buffer, 0, shape, torch.int64)
