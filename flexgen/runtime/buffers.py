"""The buffers of one block: its KV cache, its hidden states, the table rows that it looks up, and its CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen.layout.cache import cache_segments
from flexgen.layout.cache_pool import CachePool, cache_pool
from flexgen.layout.graphs import replayed
from flexgen.layout.hidden import HiddenLayout, hidden_layout
from flexgen.layout.passes import Passes
from flexgen.layout.plan import room_sizes
from flexgen.layout.tapes import recordable
from flexgen.memory.taken import run_all
from flexgen.models.layer import AttentionLayer
from flexgen.runtime.activations import Activations
from flexgen.runtime.compaction import Moved, Reseated
from flexgen.runtime.graphs import CellGraphs
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.lookup import Lookup
from flexgen.runtime.model import Model
from flexgen.runtime.prefix import SharedPrefix
from flexgen.runtime.recorded import RecordedCells
from flexgen.workload import Workload


@dataclass(frozen=True)
class BlockBuffers:
    """The buffers of a block's cells. `lookup`: None if the table is used in place. `replays`: None if no cell is
    replayed. `prefix`: the tokens that all rows share; None if they share none. `pool`: the pages of the cache that
    its batches share; None if each batch has all of its own."""

    cache: KVCache
    activations: Activations
    lookup: Lookup | None
    replays: CellGraphs | RecordedCells | None
    prefix: SharedPrefix | None = None
    pool: CachePool | None = None

    def expect(self, tokens: int) -> None:
        """Announce that the next run computes `tokens` tokens with the present batches."""
        if self.replays is not None:
            self.replays.expect(tokens)

    def end_run(self) -> None:
        """Discard the state of these batches. No step may be in flight."""
        if self.replays is not None:
            self.replays.drop()

    def reset(self, model: Model, batches: Sequence[int]) -> None:
        """Continue with the batches for which the buffers were made, for other prompts."""
        self.end_run()
        self.cache.reset()
        self.activations.regroup(_hidden_layouts(model, batches))

    def divide(self, cells: Sequence[tuple[int, range]], moved: Reseated) -> None:
        """Move the cache of some rows, and continue with cells that compute these places of these batches. No
        transfer may be in flight."""
        self.end_run()
        self.cache.divide(cells, moved)
        self.activations.divide(cells)

    def regroup(self, model: Model, batches: Sequence[Moved]) -> None:
        """Continue with these batches. No transfer may be in flight."""
        self.end_run()
        self.cache.regroup(batches, model.policy.cache)
        self.activations.regroup(_hidden_layouts(model, [moved.count for moved in batches]))


class Buffers:
    """The buffers for blocks of one shape. `batches`: the rows for which each GPU batch has room; [] without buffers.
    `prefix`: the tokens that all rows of the next buffers share. The caller closes it.

    `make` allocates them and `close` releases them, any number of times. A call has its own buffers. Those of a text
    whose cache is kept outlive its calls.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.block: BlockBuffers | None = None
        self.prefix: SharedPrefix | None = None
        self._close: list[Callable[[], object]] = []

    def fit(self, model: Model, workload: Workload, batches: Sequence[int], workspace: int) -> None:
        """Prepare for a block with these batches. The memory of a block of the same shape is used again. workspace:
        as for `Call`."""
        rooms = room_sizes(model.policy, sum(batches), workload.gen_len)
        if rooms != self.batches:
            self.make(model, workload, rooms)
            model.machine.device.reserve(workspace)
        elif self.block is not None:
            self.block.reset(model, rooms)
        if self.block is not None and rooms != batches:
            self.block.regroup(model, [Moved.entering(rows) for rows in batches])

    def make(self, model: Model, workload: Workload, batches: Sequence[int]) -> None:
        """Allocate the memory of a block with these batches."""
        self.close()
        machine, slots, dtype = model.machine, model.slots.cells, model.dtype
        passes = Passes.of(workload, model.policy, machine.device.topology)
        attention = {
            j: layer.layer_spec.attention
            for j, layer in enumerate(model.layers)
            if isinstance(layer, AttentionLayer)
        }
        storage = passes.capacity(workload.gen_len), dtype, machine.device.topology
        kinds = {
            (shape, rows): cache_segments(shape, model.policy, rows, *storage)
            for shape in {own.cache for own in attention.values()}
            for rows in set(batches)
        }
        segments = {j: [kinds[own.cache, rows] for rows in batches] for j, own in attention.items()}
        heads = {j: own.heads for j, own in attention.items()}
        self.batches = list(batches)
        pool = cache_pool(model.layers, model.policy, batches, workload, dtype, machine.device.topology)
        cache = KVCache(segments, heads, passes, machine, slots, pool)
        self._close.append(cache.close)
        activations = Activations(_hidden_layouts(model, batches), passes.new, dtype, machine, slots)
        self._close.append(activations.close)
        lookup = None
        if model.table is not None:
            lookup = Lookup(model.table, passes.positions(max(batches)), dtype, machine, slots)
            self._close.append(lookup.close)
        replays: CellGraphs | RecordedCells | None = None
        device = machine.device
        placed = model.layers, model.weights.placement, model.policy
        resident = replayed(*placed, device.topology, device.workspaces)
        recorded = recordable(*placed, passes, device.topology) if device.torch_device.type == "cpu" else ()
        if model.policy.prefill_rows:
            pass  # each pass may have other cells
        # A graph has one new token of each row, and one length of all rows.
        elif resident and self.prefix is None and not model.policy.guess:
            whole = {own: segments[j][0][0] for j, own in attention.items()}
            replays = CellGraphs(model.layers, resident, cache, whole, device)
        elif recorded:
            replays = RecordedCells(model.layers, recorded, cache, dtype)
        if replays is not None:
            self._close.append(replays.close)
        self.block = BlockBuffers(cache, activations, lookup, replays, self.prefix, pool)

    def end_call(self) -> None:
        """Discard the state of a call in buffers that outlive it."""
        if self.block is not None:
            self.block.end_run()

    def keep_cache(self) -> KVCache:
        """Release everything except the cache, which the caller closes."""
        assert self.block is not None
        cache = self.block.cache
        self._close.remove(cache.close)
        self.close()
        return cache

    def close(self) -> None:
        """Release all memory and files."""
        self.batches, self.block = [], None
        run_all(self._close)


def _hidden_layouts(model: Model, batches: Sequence[int]) -> list[HiddenLayout]:
    spec, topology = model.layers[0].spec, model.machine.device.topology
    return [hidden_layout(spec, model.policy, rows, model.dtype, topology) for rows in batches]
