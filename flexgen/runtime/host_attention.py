"""Attention by the host: for rows whose cache it holds, beside a compute device with memory of its own.

Queries and the new keys and values cross the link, and what was attended comes back; the cache stays where
it is. Each cell slot has its own buffers for that, so that a schedule may have several cells under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from flexgen.kernels.threads import all_threads
from flexgen.layout.cache import CacheSegment, Span
from flexgen.layout.plan import SLOTS
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store, tensor_at
from flexgen.memory.taken import Taken, whole_or_closed
from flexgen.runtime.pages import Bring, Padding, Page, attend

Put = Callable[[Tensor, Tensor], Sequence[Page]]
"""Writes new keys and values, as they are kept, to the pages of a segment, which are returned."""


class HostAttention:
    """Where the host's rows are asked about and answered. `layers`: by number the cache's segments of each batch;
    `heads`: of each layer's queries.

    A cell calls `collect`, `send`, `attend`, `fetch` and `take`, in this order: on the compute lane, the link,
    the host, the link and the compute lane.
    """

    @whole_or_closed
    def __init__(
        self,
        layers: Mapping[int, Sequence[Sequence[CacheSegment]]],
        heads: Mapping[int, int],
        machine: Machine,
        slots: int = SLOTS,
    ) -> None:
        self._device = machine.device
        self._taken = Taken()
        self.regroup({(j, k): some for j, batches in layers.items() for k, some in enumerate(batches)})
        self._leaving: dict[int, Tensor] = {}  # by slot: on the device until the link has taken it
        if not any(self._rows.values()):
            return
        first = {j: batches[0][0] for j, batches in layers.items()}
        self._dtype = next(iter(first.values())).dtype
        # Of each layer: heads of queries, keys and values, and values of a head.
        self._heads = {j: (heads[j], s.kv_heads, s.kv_heads) for j, s in first.items()}
        self._head_dim = {j: segment.head_dim for j, segment in first.items()}
        row = max(map(len, self._rows.values())) * self._dtype.itemsize
        asked = row * max(sum(self._heads[j]) * self._head_dim[j] for j in layers)
        answered = row * max(heads[j] * self._head_dim[j] for j in layers)
        host, device = machine.host, machine.device.memory
        self._asked = [self._take(host, asked) for _ in range(slots)]
        self._answered = [self._take(host, answered) for _ in range(slots)]
        self._arrived = [self._take(device, answered) for _ in range(slots)]

    def regroup(self, cache: Mapping[tuple[int, int], Sequence[CacheSegment]]) -> None:
        """Continue with these segments of each (layer, batch), none with more rows for the host than the largest had
        at first."""
        self._rows = {
            key: [row for s in some if not s.on_device for row in s.rows] for key, some in cache.items()
        }

    def _take(self, store: Store, nbytes: int) -> Tensor:
        return self._taken.buffer(store, nbytes, "staging of attention on the host")

    def close(self) -> None:
        """Give back all memory."""
        self._taken.close()

    def attends(self, layer: int, batch: int) -> bool:
        """Whether the host attends to any row of the batch."""
        return bool(self._rows[layer, batch])

    def collect(self, layer: int, batch: int, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Gather what the host is asked, on the device: q (rows, heads, 1, head_dim), k, v of all rows."""
        first, last = self._rows[layer, batch][0], self._rows[layer, batch][-1]
        self._leaving[slot] = torch.cat([x[first : last + 1] for x in (q, k, v)], dim=1)

    def send(self, layer: int, batch: int, slot: int) -> None:
        """What was collected, to the host."""
        self._device.from_device(self._question(layer, batch, slot), self._leaving[slot])

    def attend(
        self,
        layer: int,
        batch: int,
        slot: int,
        parts: Iterable[tuple[CacheSegment, Put, Bring | None]],
        span: Span,
        padding: Padding,
        scale: float,
    ) -> None:
        """Put what was sent into the pages of its rows, in host memory, and attend to them."""
        q, k, v = self._question(layer, batch, slot).split(self._heads[layer], dim=1)
        attended, first = self._answer(self._answered[slot], layer, batch), self._rows[layer, batch][0]
        for segment, put, bring in parts:
            here = slice(segment.rows.start - first, segment.rows.stop - first)
            pages = put(segment.heads.encode(k[here]), segment.heads.encode(v[here]))
            with all_threads():
                attended[here] = attend(pages, span, q[here], segment, padding, scale, bring)

    def fetch(self, layer: int, batch: int, slot: int) -> None:
        """What was attended, to the device."""
        arrived, answered = (self._answer(at[slot], layer, batch) for at in (self._arrived, self._answered))
        self._device.to_device(arrived, answered)

    def take(self, layer: int, batch: int, slot: int) -> Tensor:
        """What was attended, (the host's rows, heads, 1, head_dim) on the device; good until the slot's next cell."""
        return self._answer(self._arrived[slot], layer, batch)

    def _question(self, layer: int, batch: int, slot: int) -> Tensor:
        shape = (len(self._rows[layer, batch]), sum(self._heads[layer]), 1, self._head_dim[layer])
        return tensor_at(self._asked[slot], 0, shape, self._dtype)

    def _answer(self, buffer: Tensor, layer: int, batch: int) -> Tensor:
        shape = (len(self._rows[layer, batch]), self._heads[layer][0], 1, self._head_dim[layer])
        return tensor_at(buffer, 0, shape, self._dtype)
