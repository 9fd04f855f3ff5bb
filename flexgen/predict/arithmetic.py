"""The time of computation: products with plain or encoded weights, and attention over plain or encoded cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from flexgen.layout.cache import CacheSegment
from flexgen.layout.placement import Placement
from flexgen.models import Layer, WeightSpec
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Tier
from flexgen.predict.codec_rates import attention_rate, decoding_rate, fused_seconds
from flexgen.predict.hardware import Hardware
from flexgen.quant import MatrixCodec, head_format
from flexgen.results.trace import LaneName

_READ, _READ_ENCODED = 5.0, 0.5
"""The time in which the CPU kernel reads keys and values once, divided by that of the arithmetic for one query head.
In bfloat16, five tokens of 16 rows took 1.4 times as long as one with as many K/V heads as query heads, 2.6 times
with a quarter and 3.5 times with an eighth, in int4 3.4 and 4.8 (two cores with AVX-512, 1024 tokens)."""


class Arithmetic:
    """The seconds of a model's computations on `hardware`, with its weights stored as in `placement`."""

    def __init__(self, placement: Placement, hardware: Hardware) -> None:
        self._placement = placement
        self._hardware = hardware
        self._dtype = placement.dtype
        self._name = str(placement.dtype).removeprefix("torch.")
        self._known: dict[tuple[Layer, int, int, bool], float] = {}  # policies with the same weights share it

    # Products

    def products(self, layer: Layer, rows: int, new: int, first: bool) -> float:
        """Seconds of the products of a layer for `new` tokens of `rows` prompts, with element-wise work.

        first: whether the batch is the first of its visit. The batches of a visit share the decoded weights.
        """
        key = layer, rows, new, first
        if key not in self._known:
            self._known[key] = self._layer_products(*key)
        return self._known[key]

    def _layer_products(self, layer: Layer, rows: int, new: int, first: bool) -> float:
        weights = [weight for weight in layer.weights if weight is not layer.table]
        seconds = self._products(layer, weights, layer.product_flops(rows, new, new), rows * new, first)
        seconds += self._hardware.elementwise_seconds(self._name, rows * new * layer_numbers(layer))
        around = self._hardware.around_attention.get(self._name)
        if around and isinstance(layer, AttentionLayer):
            own = layer.layer_spec.attention
            seconds += around * rows * new * 2 * (own.q_size + own.kv_size)
        return seconds

    def projection(self, layer: AttentionLayer, rows: int, first: bool) -> float:
        """Seconds of the products before attention, for one token of `rows` prompts."""
        weights = layer.projections
        flops = sum(2 * rows * weight.numel for weight in weights)
        return self._products(layer, weights, flops, rows, first)

    def _products(
        self, layer: Layer, weights: Iterable[WeightSpec], flops: int, rows: int, first: bool
    ) -> float:
        """Seconds of `flops` of products of a layer, which include those with `weights`, for `rows` tokens."""
        rate = self._hardware.product_rate(self._name, rows)
        seconds = flops / rate
        known: dict[object, float] = {}  # the experts of a mixture are alike
        for weight in weights:
            each, share = layer.multiplies(weight, rows)
            kind = (
                weight.shape,
                weight.looked_up,
                self._placement.decoder(weight),
                self._stays(weight),
                each,
                share,
            )
            if kind not in known:
                counted = 2 * each * weight.numel / rate
                known[kind] = share * (self._product(weight, each, first) - counted)
            seconds += known[kind]
        return seconds

    def _product(self, weight: WeightSpec, rows: float, first: bool) -> float:
        """Seconds of a product with a matrix, for an input of `rows` rows."""
        hardware, name = self._hardware, self._name
        flops, codec = 2 * rows * weight.numel, self._placement.decoder(weight)
        if codec is None:
            return flops / hardware.product_rate(name, rows, packed=self._stays(weight))
        plain = flops / hardware.product_rate(name, rows)
        if hardware.products_decode or rows > self._fused_rows(codec):
            decodes = first or hardware.products_decode
            return plain + (self.decoding(codec, weight.numel) if decodes else 0.0)
        if encoded := hardware.encoded_rate(name, codec.name, rows):
            return flops / encoded
        expected = fused_seconds(hardware, self._dtype, codec, weight.numel, rows)
        if expected is not None:
            return expected
        # The product uses the encoded matrix, so it reads fewer bytes.
        stored = plain * self._placement.stored_bytes(weight) / weight.nbytes(self._dtype)
        return max(stored, flops / hardware.product_rate(name, math.inf))

    def _stays(self, weight: WeightSpec) -> bool:
        """Whether it is a matrix that is stored in the compute device's memory."""
        return (
            len(weight.shape) == 2
            and not weight.looked_up
            and self._hardware.topology.in_place(self._placement.of(weight))
        )

    def _fused_rows(self, codec: MatrixCodec[Any]) -> float:
        """The maximum number of rows for which a product uses the encoded matrix without decoding it."""
        measured = self._hardware.encoded_products.get(f"{self._name} {codec.name}")
        if measured is None:
            return codec.expected_fused_rows(self._hardware.topology.shares_host_memory, self._dtype)
        return measured[-1][0] if measured else 0

    def decoding(self, codec: MatrixCodec[Any], values: int) -> float:
        """Seconds of decoding `values` weights on the compute device."""
        return values * self._dtype.itemsize / decoding_rate(self._hardware, self._dtype, codec)

    # Attention

    def prompt_attention(self, layer: Layer, rows: int, tokens: int, context: int) -> float:
        """Seconds of attention for `tokens` new tokens of each row, the last of them with `context` tokens."""
        flops = layer.attention_flops(rows, tokens, context)
        return flops / self._hardware.figure("prefill_attention", self._name)

    def prefix_attention(self, layer: AttentionLayer, rows: int, tokens: int) -> float:
        """Seconds of attention of one new token of each row over `tokens` shared tokens, on the compute device.

        All rows read the same keys and values, so it is a product of matrices, unless there are few rows.
        """
        own = layer.layer_spec.attention
        nbytes = 2 * own.kv_size * tokens * self._dtype.itemsize
        form = head_format("none", own.head_dim, self._dtype)
        read = nbytes / attention_rate(self._hardware, self._dtype, "none", form, True)
        return max(read, self.prompt_attention(layer, rows, 1, tokens))

    def token_attention(
        self, segments: Sequence[CacheSegment], context: int, new: int = 1, sharing: int = 1
    ) -> tuple[float, float]:
        """Seconds of attention for the new tokens of each row, on the compute device and on the host, in parallel.

        context: the tokens of the context, including the first new one. sharing: the query heads of a K/V head.
        """
        took = {True: 0.0, False: 0.0}
        for segment in segments:
            seconds = segment.token_bytes(segment.read(context)) / attention_rate(
                self._hardware, self._dtype, segment.codec, segment.heads, segment.on_device
            )
            if segment.loads_only_keys(self._hardware.topology):
                # The compiled kernel reads all keys and only the chosen values. In torch, whole pages are multiplied.
                chosen = segment.sparsity.most(context)
                seconds *= (1 + min(chosen / context, 1)) / 2
                seconds += self._chosen_from_disk(segment, context, chosen)
            took[segment.on_device] += seconds * self._several(segment, new, sharing)
        return took[True], took[False]

    def _several(self, segment: CacheSegment, new: int, sharing: int) -> float:
        """The time of attention of `new` tokens of each row, as a multiple of that of one."""
        if segment.on_device and not self._hardware.topology.shares_host_memory:
            return new  # a GPU computes one after another
        read = _READ if segment.codec == "none" else _READ_ENCODED
        return (read + new * sharing) / (read + sharing)

    def _chosen_from_disk(self, segment: CacheSegment, context: int, chosen: int) -> float:
        """Seconds of reading the chosen values during attention, if they are spread evenly over the cached tokens."""
        on_disk = (context - 1) // segment.page_tokens * segment.page_tokens
        if segment.tier is not Tier.DISK or not on_disk:
            return 0.0
        nbytes = segment.token_bytes(chosen - 1) / 2 * on_disk / (context - 1)
        return self._hardware.fixed.disk_job + nbytes / self._hardware.bandwidth[LaneName.DISK_READ]


def layer_numbers(layer: Layer) -> float:
    """The number of activation values per token that the products of a layer read and write.

    These are the inputs and outputs of each matrix that a token is multiplied with. For a table, they are the row
    that is read, and its copy.
    """
    return sum(
        layer.multiplies(weight, 1)[1] * (2 * weight.shape[1] if weight.looked_up else sum(weight.shape))
        for weight in layer.weights
        if len(weight.shape) == 2
    )


def alike_layers(layers: Sequence[Layer], placement: Placement, by_tier: bool) -> list[int]:
    """For each layer, the first layer with the same cost: with an equal `LayerSpec` and weights in the same codecs.

    The first and the last layer of a model are equal to no other.

    by_tier: whether the tiers of the weights must be equal too, because matrices that stay on the device are stored
        in its preferred layout.
    """
    seen: dict[object, int] = {}
    first = []
    for n, layer in enumerate(layers):
        formats = tuple((placement.decoder(w), by_tier and placement.of(w)) for w in layer.weights)
        kind: object = n if layer.layer_spec is None else (type(layer), layer.layer_spec, formats)
        first.append(seen.setdefault(kind, n))
    return first
