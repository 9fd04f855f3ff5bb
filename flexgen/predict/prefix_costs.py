"""The moves of the cache of a shared prefix, which is loaded with the weights of its layer."""

from __future__ import annotations

from flexgen.layout.cache import CacheLayout, cache_layout
from flexgen.layout.prefix import prefix_policy, prefix_span
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Policy
from flexgen.predict.loads import Loads
from flexgen.predict.placed import PlacedModel
from flexgen.predict.timeline import Alike


class PrefixCosts:
    """The loads of a prefix of `tokens` tokens, or of none.

    alike: `PlacedModel.alike`, where layers have equal loads only if those of their prefixes are equal too.
    """

    def __init__(self, model: PlacedModel, policy: Policy, tokens: int) -> None:
        self._model = model
        self._span = prefix_span(tokens)
        self._layouts: dict[int, CacheLayout] = {}
        self.alike = model.alike
        if not tokens:
            return
        one, placement, topology = prefix_policy(policy), model.placement, model.hardware.topology
        for n in set(model.alike.cells):
            if isinstance(layer := model.layers[n], AttentionLayer):
                own = layer.layer_spec.attention
                self._layouts[n] = cache_layout(own, one, 1, tokens + 1, placement.dtype, topology)
        first: dict[object, int] = {}
        kinds = ((w, self._layouts.get(n)) for w, n in zip(*model.alike, strict=True))
        self.alike = Alike([first.setdefault(kind, n) for n, kind in enumerate(kinds)], model.alike.cells)

    def load(self, layer: int) -> Loads:
        """The loads of the prefix for one visit of a layer."""
        layout = self._layouts.get(self._model.alike.cells[layer])
        return self._model.lanes.loads(layout.load(self._span)) if layout else ()
