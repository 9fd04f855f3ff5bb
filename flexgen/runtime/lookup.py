"""Looks up rows of an embedding table for the cells of the first layer, and gathers them at the table's home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass
class _Slot:
    """Buffers for the rows that one cell looks up. Without a link, `staging` and `device` are the same buffer.

    `table`: the rows in the model's dtype. `gathered`: the number of rows in `staging`. `there`: that in `device`.
    """

    staging: Tensor
    device: Tensor
    table: Tensor
    gathered: int = 0
    there: int = 0


class Lookup:
    """The unique rows that the cells in flight look up, and for each id the index of its row.

    The layer uses them as a smaller table, with these indices as ids. tokens: the number of ids of the largest batch.
    """

    @whole_or_closed
    def __init__(
        self, table: RowTable, tokens: int, dtype: torch.dtype, machine: Machine, slots: int = SLOTS
    ) -> None:
        self._table = table
        self._sizes = table.sizes(tokens)
        self._layout = table.layout(tokens)
        self._device = machine.device
        self._taken = Taken()
        self._scratch = self._take(machine.host, self._sizes.scratch, copied_by_device=False)
        # One buffer serves all cells: encoded rows are decoded as part of the computation.
        decoded = self._take(machine.device.memory, self._sizes.decoded)
        self._slots = [self._make_slot(decoded, dtype, machine) for _ in range(slots)]

    def _make_slot(self, decoded: Tensor, dtype: torch.dtype, machine: Machine) -> _Slot:
        sizes, linked = self._sizes, not machine.device.shares_host_memory
        device = self._take(machine.device.memory, sizes.slot)
        staging = self._take(machine.host, sizes.staging) if linked else device
        stored = device[sizes.lead :] if self._table.codec is None else decoded
        return _Slot(staging, device, tensor_at(stored, 0, (sizes.rows, self._table.weight.shape[1]), dtype))

    def _take(self, store: Store, nbytes: int, copied_by_device: bool = True) -> Tensor:
        return self._taken.buffer(store, nbytes, "rows of the embedding table", copied_by_device)

    @property
    def name(self) -> str:
        """The table's name among the layer's weights."""
        return self._table.weight.name

    def close(self) -> None:
        """Release all memory."""
        self._taken.close()

    def load(self, ids: Tensor, slot: int) -> Chains:
        """The work that loads the rows of `ids` to the device. The ids must be in host memory when it begins."""
        gather, bring = partial(self._gather, ids, slot), partial(self._bring, ids.numel(), slot)
        return bind(self._layout.load(ids.numel()), lambda _, m: gather if m.kind is Kind.GATHER else bring)

    def _gather(self, ids: Tensor, number: int) -> None:
        rows, index = torch.unique(ids, return_inverse=True)
        slot = self._slots[number]
        self._index(slot.staging, ids.shape).copy_(index)
        self._table.gather(rows, slot.staging[self._sizes.lead :], self._scratch)
        slot.gathered = len(rows)
        if self._device.shares_host_memory:
            slot.there = slot.gathered

    def _bring(self, ids: int, number: int) -> None:
        slot = self._slots[number]
        # At most one row per id, even if more were gathered: a lane that is timed alone copies old rows.
        count, lead = min(slot.gathered, ids), self._sizes.lead
        for begin, nbytes in ((0, ids * torch.int64.itemsize), (lead, self._table.nbytes(count))):
            part = slice(begin, begin + nbytes)
            self._device.to_device(slot.device[part], slot.staging[part])
        slot.there = count

    def take(self, shape: Sequence[int], slot: int) -> tuple[Tensor, Tensor]:
        """(x of `shape`, table) on the compute device, after `load`. The values of x are rows of the table.

        Encoded rows are decoded here, as part of the computation.
        """
        found, codec = self._slots[slot], self._table.codec
        if codec is not None and found.there:
            stored = found.device[self._sizes.lead :][: self._table.nbytes(found.there)]
            codec.decode(stored, found.table[: found.there])
        return self._index(found.device, shape), found.table

    def _index(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor_at(buffer, 0, shape, torch.int64)
