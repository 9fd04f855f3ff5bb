"""Buffers of one block: its KV cache, its hidden states, the table rows that it looks up, and its CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexgen.layout.cache import cache_segments
from flexgen.layout.graphs import replayed
from flexgen.layout.passes import Passes
from flexgen.memory.taken import run_all
from flexgen.models.layer import AttentionLayer
from flexgen.runtime.activations import Activations
from flexgen.runtime.graphs import CellGraphs
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.lookup import Lookup
from flexgen.runtime.model import Model
from flexgen.workload import Workload


class Buffers:
    """Those of blocks of one shape. `batches`: rows of each GPU batch, [] while nothing is held.

    They are made with `make` and given back with `close`, any number of times. A call has its own; those of a text
    whose cache is kept outlive its calls.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.cache: KVCache | None = None
        self.activations: Activations | None = None
        self.lookup: Lookup | None = None
        self.graphs: CellGraphs | None = None

    def make(self, model: Model, workload: Workload, batches: Sequence[int]) -> None:
        """Take the memory of a block with these batches."""
        self.close()
        spec, slots = model.layers[0].spec, model.slots.cells
        passes = Passes(workload.prompt_len, model.policy.prefill_chunk)
        attention = {
            j: layer.layer_spec.attention
            for j, layer in enumerate(model.layers)
            if isinstance(layer, AttentionLayer)
        }
        kept = workload.capacity, model.dtype, model.machine.device.topology
        segments = {
            j: [cache_segments(own.cache, model.policy, rows, *kept) for rows in batches]
            for j, own in attention.items()
        }
        heads = {j: own.heads for j, own in attention.items()}
        self.batches = list(batches)
        self.cache = KVCache(segments, heads, passes.new, model.machine, slots, passes.extends)
        self.activations = Activations(
            spec, model.policy, batches, passes.new, model.dtype, model.machine, slots
        )
        device = model.machine.device
        numbers = replayed(
            model.layers, model.weights.placement, model.policy, device.topology, device.workspaces
        )
        if numbers:
            self.graphs = CellGraphs(model.layers, numbers, self.cache, device)
        if model.table is not None:
            ids = max(batches) * passes.new
            self.lookup = Lookup(model.table, ids, model.dtype, model.machine, slots)

    def drop_graphs(self) -> None:
        """Forget CUDA graphs: the batches are others from here on, or the call ends."""
        if self.graphs is not None:
            self.graphs.drop()

    def close(self) -> None:
        """Give back all memory and files."""
        self.batches = []
        held = self.cache, self.activations, self.lookup, self.graphs
        steps: list[Callable[[], object]] = [buffers.close for buffers in held if buffers is not None]
        run_all(steps)
        self.cache = self.activations = self.lookup = self.graphs = None
