"""The moves of hidden states between layers, and of ids at both ends of the model."""

from __future__ import annotations

from collections.abc import Collection

from flexgen.layout.hidden import IdLayout, hidden_layout
from flexgen.layout.passes import Passes
from flexgen.layout.rows import row_layout
from flexgen.policy import Policy
from flexgen.predict.loads import Loads
from flexgen.predict.placed import PlacedModel


class HiddenCosts:
    """The hidden states and ids of batches of the given `sizes`.

    The gathered rows of a table depend on the ids. The model assumes that all ids differ, up to the size of the
    vocabulary, and are spread evenly over the table. Few real prompts read more.
    """

    def __init__(
        self, model: PlacedModel, policy: Policy, passes: Passes, sizes: Collection[int], serial: bool
    ) -> None:
        self._model = model
        self._passes = passes
        spec, dtype = model.layers[0].spec, model.placement.dtype
        topology = model.hardware.topology
        self._layouts = {rows: hidden_layout(spec, policy, rows, dtype, topology) for rows in sizes}
        self._table = row_layout(model.layers, model.placement, topology, passes.positions(max(sizes)))
        keeps = topology.keeps_ids(self.gathers_rows) and not policy.lengths_differ
        self.feeds_ids = keeps and not serial  # see `Grid`

    @property
    def gathers_rows(self) -> bool:
        """Whether the rows of the embedding table for the ids are gathered at the table's home."""
        return self._table is not None

    def load(self, layer: int, token: int, rows: int) -> Loads:
        """The loads of ids, or of their rows of the table, for the first layer; for others, of hidden states."""
        new = self._passes.span(token).new
        if layer == self._model.last and token < 0:
            return ()
        if layer:
            return self._model.lanes.loads(self._layouts[rows].load(new))
        if self._table is not None:
            return self._model.lanes.loads(self._table.load(rows * new))
        if self.feeds_ids and token > 0:
            return ()
        return self._model.lanes.loads(self._ids(rows).load(new))

    def store(self, layer: int, token: int, rows: int) -> Loads:
        """The loads that store hidden states, or the next ids from the last layer."""
        if layer == self._model.last:
            new = self._passes.span(token).new if token > 0 else 1
            return self._model.lanes.loads(self._ids(rows).store(new)) if token >= 0 else ()
        return self._model.lanes.loads(self._layouts[rows].store(self._passes.span(token).new))

    def _ids(self, rows: int) -> IdLayout:
        return IdLayout(rows, self._model.hardware.topology)
