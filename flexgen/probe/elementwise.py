"""The time of element-wise work in layers, in addition to products and attention, in seconds per activation value.

It is measured with narrow layers. A layer with an eighth of the width and eight times the rows has the same number of
activation values as a wide layer, and an eighth of its flops. The times of both give the time per flop and per value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexgen.kernels.rotation import token_factors
from flexgen.kernels.scoring import Scoring
from flexgen.memory.device import ComputeDevice
from flexgen.models import Chunk
from flexgen.models.attention import Attention
from flexgen.models.dummy import DummyCheckpoint
from flexgen.models.ops import causal_attention, rope_tables
from flexgen.models.spec import LayerSpec, ModelSpec, RopeSpec
from flexgen.predict.arithmetic import layer_numbers
from flexgen.predict.hardware import Points, interpolated, seconds_of_each
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import Effort, Stopwatch
from flexgen.runtime.pages import Page, put

_NARROWER = 8
_FEWER = 32
"""The second point has fewer values by this factor. They fit in a processor cache; those of the first do not."""
_LEAST_SHARE = 0.1
_GROUP = 4
"""Heads that share keys and values."""
_PROMPT = 32
"""The tokens of a prompt so short that its attention has little arithmetic."""
_MOST = 0.5
"""The largest share of a wide layer's time. A wide layer is mostly arithmetic, so more would be noise."""


class ElementwiseProbe:
    """Measures narrow layers, for comparison with the wide layers of `probe` in the same dtype."""

    def __init__(
        self,
        probe: ArithmeticProbe,
        device: ComputeDevice,
        dtype: torch.dtype,
        effort: Effort,
        watch: Stopwatch,
    ) -> None:
        # The working set is one layer: the weights of a small model stay in the processor caches.
        narrow = replace(
            effort,
            hidden=effort.hidden // _NARROWER,
            heads=max(effort.heads // _NARROWER, 1),
            working_set=1,
        )
        self._narrow = ArithmeticProbe(device, dtype, narrow, watch)
        self._wide = probe.layer
        self._device = device
        self._settle = device.wait_for_compute
        self._dtype = dtype
        self._most = effort.rows[-1]
        self._watch = watch

    def seconds_of_numbers(self, rates: Points) -> Points:
        """Pairs (values in a layer, seconds per value), given the `rates` of wide layers, which include this time."""
        layer, wide, points = self._narrow.layer, self._wide, []
        for rows in (max(self._most // _FEWER, 1), self._most):
            tokens = rows * _NARROWER
            took = self._narrow.multiplying_seconds(tokens)
            rate = interpolated(rates, tokens)
            numbers = tokens * layer_numbers(layer)
            other = took - layer.product_flops(tokens, 1, 1) / rate
            # The rate of the wide layer includes its own share of element-wise work.
            own = layer_numbers(wide) * layer.product_flops(1, 1, 1) / wide.product_flops(1, 1, 1)
            each = other / (numbers - tokens * own)
            whole = wide.product_flops(1, 1, 1) / rate / layer_numbers(wide)
            points.append((float(numbers), min(max(each, 0.0), _MOST * whole)))
        return tuple(points)

    def alone(self, rates: Points, seconds: Points) -> Points:
        """The `rates` of wide layers without the `seconds` of their element-wise work.

        Both are measured at different times. On a noisy machine, element-wise work can seem to take longer than the
        whole layer. So the products keep at least `_LEAST_SHARE` of the time.
        """
        flops, numbers = self._wide.product_flops(1, 1, 1), layer_numbers(self._wide)
        shares = ((rows, rate, seconds_of_each(seconds, rows * numbers)) for rows, rate in rates)
        return tuple(
            (rows, 1 / max(1 / rate - each * numbers / flops, _LEAST_SHARE / rate))
            for rows, rate, each in shares
        )

    def around_attention(self, rate: float) -> float:
        """The seconds per value of queries, keys, values and attention output. `rate`: flop/s of prompt attention.

        They include rotary positions, which most families have. The heads are as many as those of wide layers, and
        share keys and values: the work around attention depends on their sizes, not on that of the projections.
        """
        spec = _with_heads(self._narrow.layer.spec, self._wide.spec)
        layer, rotated, checkpoint = Attention(spec, 0), Attention(_with_rope(spec), 0), DummyCheckpoint()
        weights = {
            weight.name: checkpoint.read(weight, self._dtype).to(self._device.torch_device)
            for weight in layer.weights
        }
        own = spec.layers[0].attention

        def around(rows: int) -> float:
            context = _Attending(own.kv_heads, own.head_dim, rows, self._dtype, self._device.torch_device)
            x = torch.randn(rows, _PROMPT, spec.hidden_size).to(self._device.torch_device, self._dtype)

            def multiply() -> None:
                q, _, _ = layer.qkv(x, weights, context)
                layer.output(q, x, weights)

            forward = partial(rotated.forward, x, weights, context)
            whole, products = (self._watch.seconds(work, self._settle) for work in (forward, multiply))
            return max(whole - products, 0.0)

        rows = max(self._most // _PROMPT, 1)
        seconds = self._narrow.without_launches(around(rows), lambda: around(1))
        seconds -= layer.attention_flops(rows, _PROMPT, _PROMPT) / rate
        return max(seconds, 0.0) / (rows * _PROMPT * 2 * (own.q_size + own.kv_size))


def _with_heads(narrow: ModelSpec, wide: ModelSpec) -> ModelSpec:
    """The narrow model with the heads of the wide one, of which several share keys and values."""
    own = wide.layers[0].attention
    shared = replace(own, kv_heads=max(own.heads // _GROUP, 1))
    return replace(narrow, layers=tuple(replace(layer, attention=shared) for layer in narrow.layers))


def _with_rope(spec: ModelSpec) -> ModelSpec:
    """The model with rotary positions in all layers."""

    def rotated(layer: LayerSpec) -> LayerSpec:
        own, pairs = layer.attention, layer.attention.head_dim // 2
        rope = RopeSpec("default", tuple(10_000.0 ** (-pair / pairs) for pair in range(pairs)))
        return replace(layer, attention=replace(own, rope=rope))

    return replace(spec, layers=tuple(map(rotated, spec.layers)))


class _Attending:
    """The context of a layer in the prefill: it stores keys and values in pages and computes attention."""

    last_only = True
    text_length = None

    def __init__(self, heads: int, width: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.positions = torch.zeros(rows, _PROMPT, dtype=torch.int64, device=device)
        page = torch.zeros(2, rows, heads, _PROMPT, width, dtype=dtype, device=device)
        self._pages: Sequence[Page] = [(page[0], page[1])]

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return token_factors(*rope_tables(rope, self.positions, dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        self.keep_new(k, v)
        return causal_attention(q, k, v, None, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        put(self._pages, 0, k, v)

    def attend_chunk(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        seen = (chunk.rows, slice(None), slice(chunk.tokens.stop))
        return causal_attention(q, k[seen], v[seen], None, scoring)
