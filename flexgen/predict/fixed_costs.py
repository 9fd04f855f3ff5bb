"""The fixed seconds of cells: of those that a layer's code computes, and of those that a CPU repeats from tapes."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.layout.hidden import hidden_layout
from flexgen.layout.passes import Passes
from flexgen.layout.tapes import MIN_TOKENS, MOST_BYTES, kept_bytes, recordable
from flexgen.policy import Policy
from flexgen.predict.placed import PlacedModel
from flexgen.workload import Workload

_RECORDED_IN = 1
"""The pass before which cells are recorded. It and later passes repeat them."""


class FixedCosts:
    """The fixed seconds of the cells of a block.

    sizes: the rows of each batch.
    gathers_rows: whether the rows of the embedding table for the ids are gathered before the first layer.
    """

    def __init__(
        self, model: PlacedModel, policy: Policy, workload: Workload, sizes: Sequence[int], gathers_rows: bool
    ) -> None:
        self._fixed = fixed = model.hardware.fixed
        self._model = model
        # Of the cells of equal layers, the shares that are recorded, and that are repeated.
        self._recorded: dict[int, float] = {}
        self._repeated: dict[int, float] = {}
        passes, topology = Passes.of(workload, policy), model.hardware.topology
        # Rows that end early leave rows of different lengths, whose cells are not recorded.
        differ = workload.mean_new is not None or policy.prefill_rows
        if not fixed.recorded or differ or workload.gen_len <= MIN_TOKENS:
            self._each = 0.0
            return
        layers = recordable(model.layers, model.placement, policy, passes, topology)
        dtype = model.placement.dtype
        nbytes = sum(kept_bytes(model.layers, layers, rows, dtype) for rows in sizes)
        kept = min(MOST_BYTES / nbytes, 1.0) if nbytes else 0.0
        kinds = model.alike.cells
        for kind in set(kinds):
            equal = [j for j, other in enumerate(kinds) if other == kind]
            self._recorded[kind] = len(set(equal) & set(layers)) / len(equal)
            self._repeated[kind] = kept * self._recorded[kind]
        hidden = hidden_layout(model.layers[0].spec, policy, sizes[0], dtype, topology)
        moves = gathers_rows or hidden.away or any(layout.runs for layout in model.layouts)
        alone = len(sizes) == 1 and len(layers) == len(model.layers) - 1 and not moves and not policy.guess
        self._each = fixed.joined if alone else fixed.recorded

    def of_cell(self, index: int, token: int) -> float:
        """The fixed seconds of a cell. index: the first of the equal layers."""
        layer, fixed = self._model.layers[index], self._fixed
        computed = fixed.cell + (fixed.attention if layer.has_cache else 0.0)
        share = self._repeated.get(index, 0.0)
        if token < _RECORDED_IN or not share:
            return computed
        recording = self._recorded[index] * fixed.recording if token == _RECORDED_IN else 0.0
        return (1 - share) * computed + share * self._each + recording

    @property
    def before_attention(self) -> float:
        """The fixed seconds of the first part of a cell whose attention is a step of its own."""
        fixed = self._fixed
        return fixed.split / 2 or fixed.cell / 2 + fixed.attention

    @property
    def after_attention(self) -> float:
        """The fixed seconds of the second part of such a cell."""
        return (self._fixed.split or self._fixed.cell) / 2
