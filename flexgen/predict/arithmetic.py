"""What computation takes: products with weights in any form, and attention over a cache in any form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from flexgen.layout.cache import CacheSegment
from flexgen.layout.placement import Placement
from flexgen.models import Layer, WeightSpec
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Tier
from flexgen.predict.codec_rates import attention_rate, decoding_rate
from flexgen.predict.hardware import Hardware
from flexgen.quant import Codec
from flexgen.results.trace import LaneName


class Arithmetic:
    """Seconds of a model's computations on `hardware`, with its weights kept as `placement` says."""

    def __init__(self, placement: Placement, hardware: Hardware) -> None:
        self._placement = placement
        self._hardware = hardware
        self._dtype = placement.dtype
        self._name = str(placement.dtype).removeprefix("torch.")
        self._known: dict[tuple[Layer, int, int, bool], float] = {}  # policies with the same weights share it

    # Products

    def products(self, layer: Layer, rows: int, new: int, first: bool) -> float:
        """All products of a layer, for `new` tokens of `rows` prompts, with the element-wise work between them and
        around attention. `first`: of the batches of a visit, which share the decoded weights."""
        key = layer, rows, new, first
        if key not in self._known:
            self._known[key] = self._layer_products(*key)
        return self._known[key]

    def _layer_products(self, layer: Layer, rows: int, new: int, first: bool) -> float:
        weights = [weight for weight in layer.weights if weight is not layer.table]
        seconds = self._products(weights, layer.product_flops(rows, new, new), rows * new, first)
        seconds += self._hardware.elementwise_seconds(self._name, rows * new * layer_numbers(layer))
        around = self._hardware.around_attention.get(self._name)
        if around and isinstance(layer, AttentionLayer):
            own = layer.layer_spec.attention
            seconds += around * rows * new * 2 * (own.q_size + own.kv_size)
        return seconds

    def projection(self, layer: AttentionLayer, rows: int, first: bool) -> float:
        """The products before attention, for a token of `rows` prompts."""
        weights = layer.projections
        return self._products(weights, sum(2 * rows * weight.numel for weight in weights), rows, first)

    def _products(self, weights: Iterable[WeightSpec], flops: int, rows: int, first: bool) -> float:
        """`flops` with the matrices among `weights`, for an input of `rows` rows."""
        hardware, name = self._hardware, self._name
        rate = hardware.product_rate(name, rows)
        seconds = flops / rate
        for weight in weights:
            plain = 2 * rows * weight.numel / rate
            codec = self._placement.codec(weight)
            if codec is None:
                if self._stays(weight):
                    seconds += (
                        2 * rows * weight.numel / hardware.product_rate(name, rows, packed=True) - plain
                    )
            elif hardware.products_decode or rows > self._fused_rows(codec):
                if first or hardware.products_decode:
                    seconds += self.decoding(codec, weight.numel)
            elif encoded := hardware.encoded_rate(name, codec.name, rows):
                seconds += 2 * rows * weight.numel / encoded - plain
            else:
                # Multiplied as it is kept: fewer bytes of the weight are read.
                kept = plain * self._placement.kept_bytes(weight) / weight.nbytes(self._dtype)
                least = 2 * rows * weight.numel / hardware.product_rate(name, math.inf)
                seconds += max(kept, least) - plain
        return seconds

    def _stays(self, weight: WeightSpec) -> bool:
        """Whether it is a matrix that is stored in the compute device's memory."""
        return (
            len(weight.shape) == 2
            and not weight.looked_up
            and self._hardware.topology.in_place(self._placement.of(weight))
        )

    def _fused_rows(self, codec: Codec) -> float:
        """Most rows for which a matrix is multiplied as `codec` keeps it."""
        measured = self._hardware.encoded_products.get(f"{self._name} {codec.name}")
        if measured is None:
            return codec.expected_fused_rows(self._hardware.topology.shares_host_memory, self._dtype)
        return measured[-1][0] if measured else 0

    def decoding(self, codec: Codec, values: int) -> float:
        """Of encoded weights on the compute device."""
        return values * self._dtype.itemsize / decoding_rate(self._hardware, self._dtype, codec)

    # Attention

    def prompt_attention(self, layer: Layer, rows: int, tokens: int, context: int) -> float:
        """For `tokens` new tokens of each row, the last of which attends to `context` tokens."""
        flops = layer.attention_flops(rows, tokens, context)
        return flops / self._hardware.figure("prefill_attention", self._name)

    def token_attention(self, segments: Sequence[CacheSegment], context: int) -> tuple[float, float]:
        """For one new token of each row, which attends to `context` tokens, itself included: on the compute device
        and on the host, at the same time."""
        took = {True: 0.0, False: 0.0}
        for segment in segments:
            seconds = segment.token_bytes(context) / attention_rate(
                self._hardware, self._dtype, segment.codec, segment.heads, segment.on_device
            )
            if segment.loads_only_keys(self._hardware.topology):
                # The compiled kernel reads all keys and the chosen values; in torch whole pages are multiplied.
                chosen = segment.sparsity.most(context)
                seconds *= (1 + min(chosen / context, 1)) / 2
                seconds += self._chosen_from_disk(segment, context, chosen)
            took[segment.on_device] += seconds
        return took[True], took[False]

    def _chosen_from_disk(self, segment: CacheSegment, context: int, chosen: int) -> float:
        """Reads of chosen values during attention, if these are spread evenly over the cached tokens."""
        on_disk = (context - 1) // segment.page_tokens * segment.page_tokens
        if segment.tier is not Tier.DISK or not on_disk:
            return 0.0
        nbytes = segment.token_bytes(chosen - 1) / 2 * on_disk / (context - 1)
        return self._hardware.fixed.disk_job + nbytes / self._hardware.bandwidth[LaneName.DISK_READ]


def layer_numbers(layer: Layer) -> int:
    """How many numbers of activations the products of a layer take and give, for each token: the inputs and the
    outputs of each of its matrices. Of a table they are the rows that are read, and the same rows as output."""
    return sum(
        2 * weight.shape[1] if weight.looked_up else sum(weight.shape)
        for weight in layer.weights
        if len(weight.shape) == 2
    )


def alike_layers(layers: Sequence[Layer], placement: Placement, by_tier: bool) -> list[int]:
    """For each layer the first one that costs the same: it has an equal `LayerSpec`, and weights that are kept in the
    same way. Both ends of a model are alike to nothing. `by_tier`: matrices that stay on the device are laid out for
    products there."""
    seen: dict[object, int] = {}
    first = []
    for n, layer in enumerate(layers):
        kept = tuple((placement.codec(w), by_tier and placement.of(w)) for w in layer.weights)
        kind: object = n if layer.layer_spec is None else (type(layer), layer.layer_spec, kept)
        first.append(seen.setdefault(kind, n))
    return first
