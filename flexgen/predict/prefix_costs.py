"""The moves of the cache of a shared prefix, which is loaded with the weights of its layer."""

from __future__ import annotations

from itertools import chain

from flexgen.layout.cache import CacheLayout, cache_layout
from flexgen.layout.prefix import prefix_policy, prefix_span, prefix_workloads
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Policy
from flexgen.predict.loads import Loads
from flexgen.predict.placed import PlacedModel
from flexgen.predict.timeline import Alike
from flexgen.workload import Workload


class PrefixCosts:
    """The loads of the prefix of a workload, part by part.

    alike: `PlacedModel.alike`, where layers have equal loads only if those of their prefixes are equal too.
    """

    def __init__(self, model: PlacedModel, policy: Policy, workload: Workload) -> None:
        self._model = model
        blocks = prefix_workloads(workload, policy)
        self._tokens = [block.prompt_len - block.prefix for block in blocks]
        self._layouts: dict[int, tuple[CacheLayout, ...]] = {}
        self.alike = model.alike
        if not blocks:
            return
        one, placement, topology = prefix_policy(policy), model.placement, model.hardware.topology
        for n in set(model.alike.cells):
            if isinstance(layer := model.layers[n], AttentionLayer):
                own = layer.layer_spec.attention
                self._layouts[n] = tuple(
                    cache_layout(own, one, 1, tokens + 1, placement.dtype, topology)
                    for tokens in self._tokens
                )
        first: dict[object, int] = {}
        kinds = ((w, self._layouts.get(n)) for w, n in zip(*model.alike, strict=True))
        self.alike = Alike([first.setdefault(kind, n) for n, kind in enumerate(kinds)], model.alike.cells)

    def load(self, layer: int) -> Loads:
        """The loads of the prefix for one visit of a layer."""
        layouts = self._layouts.get(self._model.alike.cells[layer], ())
        routes = (
            layout.load(prefix_span(tokens))
            for tokens, layout in zip(self._tokens, layouts, strict=bool(layouts))
        )
        return self._model.lanes.loads(chain.from_iterable(routes))
