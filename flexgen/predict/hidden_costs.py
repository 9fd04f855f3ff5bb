"""What hidden states move between layers, and ids at both ends of the model."""

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

    The rows of a table that are gathered depend on the ids. These are taken to be all different, up to the
    vocabulary, and to be spread evenly over the table: few others read more.
    """

    def __init__(
        self, model: PlacedModel, policy: Policy, passes: Passes, sizes: Collection[int], serial: bool
    ) -> None:
        self._model = model
        self._passes = passes
        spec, dtype = model.layers[0].spec, model.placement.dtype
        topology = model.hardware.topology
        self._layouts = {rows: hidden_layout(spec, policy, rows, dtype, topology) for rows in sizes}
        self._table = row_layout(model.layers, model.placement, topology, max(sizes) * passes.new)
        self.feeds_ids = topology.keeps_ids(self.gathers_rows) and not serial  # as of the grid

    @property
    def gathers_rows(self) -> bool:
        """Whether the rows of the embedding table that the ids name are gathered at its home."""
        return self._table is not None

    def load(self, layer: int, token: int, rows: int) -> Loads:
        """Ids or their rows of the table for the first layer, hidden states for the others."""
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
        """Hidden states, or the next ids from the last layer."""
        if layer == self._model.last:
            return self._model.lanes.loads(self._ids(rows).store()) if token >= 0 else ()
        return self._model.lanes.loads(self._layouts[rows].store(self._passes.span(token).new))

    def _ids(self, rows: int) -> IdLayout:
        return IdLayout(rows, self._model.hardware.topology)
