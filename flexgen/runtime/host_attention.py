"""Attention on the host for rows whose cache is in host memory, for a compute device with separate memory.

Queries and the new keys and values cross the link to the host, and the result returns. The cache does not move. Each
cell slot has its own buffers for that, so that a schedule may have several cells in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexgen.kernels.partial import Partial
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.threads import all_threads
from flexgen.layout.cache import CacheSegment
from flexgen.layout.passes import Passes
from flexgen.layout.plan import SLOTS
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.runtime.attention_outputs import AttentionOutput
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.pages import Bring, Page, attend

Put = Callable[[Tensor, Tensor], Sequence[Page]]
"""Writes new keys and values in their stored form to the pages of a segment, and returns the pages."""


class HostAttention:
    """Computes attention for the host's rows, and owns the buffers for it. Its arguments are those of `KVCache`.

    If the rows share a prefix, the device attends to it, and the results are parts to be merged.

    A cell calls `collect`, `send`, `attend`, `fetch` and `take`, in this order: on the compute lane, the link,
    the host, the link and the compute lane.
    """

    @whole_or_closed
    def __init__(
        self,
        layers: Mapping[int, Sequence[Sequence[CacheSegment]]],
        heads: Mapping[int, int],
        passes: Passes,
        machine: Machine,
        slots: int = SLOTS,
    ) -> None:
        self._device = machine.device
        self._in_part = passes.shared > 0
        self._taken = Taken()
        self.regroup({(j, k): some for j, batches in layers.items() for k, some in enumerate(batches)})
        self._sinks: dict[int, Tensor] = {}
        self._leaving: dict[int, Tensor] = {}  # by slot: on the device until it has crossed the link
        if not any(self._rows.values()):
            return
        first = {j: batches[0][0] for j, batches in layers.items()}
        self._dtype = next(iter(first.values())).dtype
        # For each layer: heads of queries, keys and values, and values per head.
        self._heads = {j: (heads[j], s.kv_heads, s.kv_heads) for j, s in first.items()}
        self._head_dim = {j: segment.head_dim for j, segment in first.items()}
        tokens = max(map(len, self._rows.values())) * passes.decoded
        asked = tokens * self._dtype.itemsize * max(sum(self._heads[j]) * self._head_dim[j] for j in layers)
        answered = tokens * max(map(self._answer_bytes, layers))
        host, device = machine.host, machine.device.memory
        self._asked = [self._take(host, asked) for _ in range(slots)]
        self._answered = [self._take(host, answered) for _ in range(slots)]
        self._arrived = [self._take(device, answered) for _ in range(slots)]

    def regroup(self, cache: Mapping[tuple[int, int], Sequence[CacheSegment]]) -> None:
        """Continue with these segments of each (layer, batch).

        None may have more rows for the host than the largest one had at first.
        """
        self._rows = {
            key: [row for s in some if not s.on_device for row in s.rows] for key, some in cache.items()
        }

    def _take(self, store: Store, nbytes: int) -> Tensor:
        return self._taken.buffer(store, nbytes, "staging of attention on the host")

    def close(self) -> None:
        """Release all memory."""
        self._taken.close()

    def attends(self, cell: BoundCell) -> bool:
        """Whether the host computes attention for any row of the batch."""
        return bool(self._rows[cell.layer, cell.batch])

    def collect(self, cell: BoundCell, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Gather the host's rows on the device, from q (rows, heads, new, head_dim), k and v of all rows."""
        first, last = self._rows[cell.layer, cell.batch][0], self._rows[cell.layer, cell.batch][-1]
        self._leaving[cell.slot] = torch.cat([x[first : last + 1] for x in (q, k, v)], dim=1)

    def send(self, cell: BoundCell) -> None:
        """Copy the gathered rows to the host."""
        self._device.from_device(self._question(cell), self._leaving[cell.slot])

    def attend(
        self,
        cell: BoundCell,
        parts: Iterable[tuple[CacheSegment, Put, Bring | None]],
        scoring: Scoring,
    ) -> None:
        """Write the new keys and values to the pages of their rows in host memory, and compute attention."""
        q, k, v = self._question(cell).split(self._heads[cell.layer], dim=1)
        scoring = self._on_host(cell.layer, scoring)
        answer, first = self._answer(self._answered, cell), self._rows[cell.layer, cell.batch][0]
        for segment, put, bring in parts:
            here = slice(segment.rows.start - first, segment.rows.stop - first)
            pages = put(segment.heads.encode(k[here]), segment.heads.encode(v[here]))
            with all_threads():
                found = attend(pages, cell, segment, q[here], scoring, bring)
            tensors = found if isinstance(found, Partial) else (found,)
            for target, source in zip(answer, tensors, strict=True):
                target[here] = source

    def _on_host(self, layer: int, scoring: Scoring) -> Scoring:
        """`scoring` with the layer's sinks in host memory. They are copied once."""
        if scoring.sinks is None:
            return scoring
        if layer not in self._sinks:
            self._sinks[layer] = scoring.sinks.to("cpu", torch.float32, copy=True)
        return replace(scoring, sinks=self._sinks[layer])

    def fetch(self, cell: BoundCell) -> None:
        """Copy the result to the device."""
        tokens = len(self._rows[cell.layer, cell.batch]) * cell.span.new
        nbytes = tokens * self._answer_bytes(cell.layer)
        self._device.to_device(self._arrived[cell.slot][:nbytes], self._answered[cell.slot][:nbytes])

    def take(self, cell: BoundCell) -> AttentionOutput:
        """The result (host rows, heads, new, head_dim) on the device. It is valid until the slot's next cell."""
        values, *lse = self._answer(self._arrived, cell)
        return Partial(values.float(), *lse) if lse else values

    def _question(self, cell: BoundCell) -> Tensor:
        rows, layer = len(self._rows[cell.layer, cell.batch]), cell.layer
        shape = rows, sum(self._heads[layer]), cell.span.new, self._head_dim[layer]
        return tensor_at(self._asked[cell.slot], 0, shape, self._dtype)

    def _answer(self, buffers: Sequence[Tensor], cell: BoundCell) -> tuple[Tensor, ...]:
        """The values of the results, and behind them the log-sum-exp of each head if the results are parts."""
        rows, layer = len(self._rows[cell.layer, cell.batch]), cell.layer
        shape = rows, self._heads[layer][0], cell.span.new, self._head_dim[layer]
        values = tensor_at(buffers[cell.slot], 0, shape, self._dtype)
        if not self._in_part:
            return (values,)
        return values, tensor_at(buffers[cell.slot], values.nbytes, shape[:3], torch.float32)

    def _answer_bytes(self, layer: int) -> int:
        """The size of the result of one token of one row."""
        values = self._head_dim[layer] * self._dtype.itemsize
        return self._heads[layer][0] * (values + self._in_part * torch.float32.itemsize)
