"""The speed of the engine's layers, kernels and codecs on a device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.quantized import EVERY_ROW, QuantizedMatrix
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.tape import record, replay
from flexgen.layout.tapes import MOST_BYTES, temporary_bytes
from flexgen.memory.device import ComputeDevice
from flexgen.memory.store import Store, tensor_at
from flexgen.models import WeightSpec, open_model
from flexgen.models.block import Block
from flexgen.models.dummy import DummyCheckpoint
from flexgen.models.layer import Context
from flexgen.models.ops import causal_attention
from flexgen.models.sources import Source
from flexgen.models.spec import ModelSpec
from flexgen.predict.hardware import Points
from flexgen.probe.effort import Effort, Stopwatch
from flexgen.quant import Codec

_PAGE_TOKENS = 128
_CACHE_ROWS = 8
"""The rows of a cache in host memory."""
_PROMPT_ROWS = 4
_LAUNCHES: dict[str, Any] = {"hidden": 64, "heads": 2, "rows": (1,), "working_set": 1}
"""The effort for a layer so small that its time on a GPU is that of its kernel launches."""
_LEAST_OWN = 0.5
"""The minimum share of a time that remains after launches are subtracted. Below it, the result would be noise."""


class ArithmeticProbe:
    """Measures transformer layers of the size in `effort`, in one dtype. `layer` is one of these layers."""

    def __init__(self, device: ComputeDevice, dtype: torch.dtype, effort: Effort, watch: Stopwatch) -> None:
        self._device = device
        self._dtype = dtype
        self._effort = effort
        self._watch = watch
        from transformers import LlamaConfig  # takes seconds, and few processes measure

        config = LlamaConfig(
            hidden_size=effort.hidden,
            intermediate_size=4 * effort.hidden,
            num_attention_heads=effort.heads,
            num_hidden_layers=1,
        )
        self._spec = _without_rope(open_model(config, "dummy")[0])
        self.layer = Block(self._spec, 0)
        self._checkpoint = DummyCheckpoint()
        self._owned: list[tuple[Store, Tensor]] = []

    def release(self) -> None:
        """Free all buffers."""
        for store, buffer in self._owned:
            store.release(buffer)
        self._owned.clear()

    # Products

    def products(self) -> Points:
        """flop/s of layers whose matrices are moved to the device, by rows of activations."""
        return self._rates(self._plain, self._effort.rows)

    def packed_products(self) -> Points:
        """flop/s with matrices that stay on the device, in its preferred layout, by rows of activations."""
        return self._rates(self._laid_out, self._effort.rows)

    def encoded_products(self, codec: Codec) -> Points:
        """flop/s of products with encoded matrices, by rows; empty if the codec decodes every matrix first."""
        weight = next(weight for weight in self.layer.weights if codec.fits(weight.shape))
        most = self._encoded(codec, weight).fused_rows(self._dtype)
        if not most:
            return ()
        measured = {rows for rows in self._effort.rows if rows < most}
        if most < EVERY_ROW:
            return self._rates(partial(self._encoded, codec), sorted(measured | {most}))
        points = self._rates(partial(self._encoded, codec), sorted(measured))
        return *points, (float(most), points[-1][1])  # the last point is the most rows

    def decoding(self, codec: Codec) -> float:
        """Bytes/s of decoded output."""
        whole, least = (self._effort.hidden,) * 2, (1, self._effort.hidden)
        seconds = self.without_launches(
            self._decoding_seconds(codec, whole), lambda: self._decoding_seconds(codec, least)
        )
        return math.prod(whole) * self._dtype.itemsize / seconds

    def _decoding_seconds(self, codec: Codec, shape: tuple[int, int]) -> float:
        weight = WeightSpec("decoded.weight", shape, (Source("decoded.weight"),))
        encoded = codec.encode(self._checkpoint.read(weight, self._dtype))
        out_bytes = weight.nbytes(self._dtype)
        count = self._count(out_bytes + encoded.nbytes)
        # Write to the output first: the system allocates pages at the first touch, which takes longer than decoding.
        pairs = itertools.cycle(
            [
                (self._place(encoded), tensor_at(self._take(out_bytes), 0, shape, self._dtype).zero_())
                for _ in range(count)
            ]
        )
        seconds = self._watch.seconds(lambda: codec.decode(*next(pairs)), self._device.wait_for_compute)
        self.release()
        return seconds

    def multiplying(self, rows: int) -> Callable[[], object]:
        """The work of `products` with `rows` rows. It is valid until `release`."""
        return self._in_turn(self._rows(rows), self._layers(self._plain))

    def _rates(self, form: Callable[[WeightSpec], Any], rows: Sequence[int]) -> Points:
        layers = self._layers(form)
        points = []
        for tokens in rows:
            x = self._rows(tokens)
            work = self._repeated(x, layers) or self._in_turn(x, layers)
            seconds = self._watch.seconds(work, self._device.wait_for_compute)
            seconds = self.without_launches(seconds, self._layer_launches)
            points.append((float(tokens), self.layer.product_flops(tokens, 1, 1) / seconds))
        self.release()
        return tuple(points)

    def multiplying_seconds(self, rows: int) -> float:
        """The seconds of a layer's products and the operations between them, for `rows` rows, without launches."""
        seconds = self._watch.seconds(self.multiplying(rows), self._device.wait_for_compute)
        self.release()
        return self.without_launches(seconds, self._layer_launches)

    @cached_property
    def _tiny(self) -> ArithmeticProbe:
        """A probe of layers so small that their time on a GPU is that of their launches."""
        return ArithmeticProbe(self._device, self._dtype, replace(self._effort, **_LAUNCHES), self._watch)

    def _layer_launches(self) -> float:
        """The seconds of the launches of a layer's products."""
        seconds = self._watch.seconds(self._tiny.multiplying(1), self._device.wait_for_compute)
        self._tiny.release()
        return seconds

    def without_launches(self, seconds: float, launches: Callable[[], float]) -> float:
        """`seconds` of work on the device minus the time of its `launches`, which is part of `fixed.cell`.

        A CPU has no launches. At least `_LEAST_OWN` of the time remains.
        """
        if self._device.torch_device.type == "cpu":
            return seconds
        return max(seconds - launches(), _LEAST_OWN * seconds)

    def _rows(self, tokens: int) -> Tensor:
        return torch.randn(tokens, 1, self._spec.hidden_size).to(self._device.torch_device, self._dtype)

    def _layers(self, form: Callable[[WeightSpec], Any]) -> list[dict[str, Any]]:
        """The weights of enough layers for a working set."""
        one = {weight.name: form(weight) for weight in self.layer.weights}
        count = self._count(sum(_nbytes(tensor) for tensor in one.values()))
        others = [{weight.name: form(weight) for weight in self.layer.weights} for _ in range(count - 1)]
        return [one, *others]

    def has_tapes(self) -> bool:
        """Whether the runtime repeats the cells of such a layer from tapes."""
        repeated = self._tiny._repeated(self._tiny._rows(1), self._tiny._layers(self._tiny._plain))
        self._tiny.release()
        return repeated is not None

    def _in_turn(self, x: Tensor, layers: Sequence[dict[str, Any]]) -> Callable[[], object]:
        """The computation of one of the layers after the other, without end."""
        ring = itertools.cycle(layers)
        return lambda: self._forward(x, next(ring))

    def _repeated(self, x: Tensor, layers: Sequence[dict[str, Any]]) -> Callable[[], object] | None:
        """`_in_turn` from tapes, or None if the runtime has no tapes of such layers.

        The time of the code between the kernels is in `fixed.cell`: it depends little on the layer.
        """
        if self._device.torch_device.type != "cpu":
            return None
        if temporary_bytes(self.layer, len(x), self._dtype) > MOST_BYTES:
            return None
        tapes = []
        for layer in layers:
            recorded = record(partial(self._forward, x, layer))
            if recorded is None:
                return None
            tapes.append(recorded[1])
        ring = itertools.cycle(tapes)
        return lambda: replay([next(ring)], 0)

    def _forward(self, x: Tensor, weights: dict[str, Any]) -> Tensor:
        """Compute a layer without attention: the products with norms, biases and residual connections."""
        context = SimpleNamespace(positions=None, text_length=None)
        q, _, _ = self.layer.qkv(x, weights, cast(Context, context))
        return self.layer.output(q, x, weights)

    def _plain(self, weight: WeightSpec) -> Tensor:
        return self._place(self._checkpoint.read(weight, self._dtype))

    def _laid_out(self, weight: WeightSpec) -> Tensor:
        values = self._checkpoint.read(weight, self._dtype)
        prelayout = self._device.prelayout(self._dtype)
        return prelayout(values) if prelayout and values.dim() == 2 else self._place(values)

    def _encoded(self, codec: Codec, weight: WeightSpec) -> Any:
        values = self._checkpoint.read(weight, self._dtype)
        if not codec.fits(weight.shape):
            return self._place(values)
        encoded = self._place(codec.encode(values))
        place, dtype = self._device.torch_device, self._dtype

        def decode() -> Tensor:  # caches nothing: decoded matrices would be many times the working set
            out = torch.empty(weight.shape, dtype=dtype, device=place)
            codec.decode(encoded, out)
            return out

        return codec.matrix(encoded, weight.shape, dtype, decode)

    # Attention

    def prompt_attention(self) -> float:
        """flop/s of causal attention over prompts."""
        tokens = self._effort.prompt
        seconds = self.without_launches(
            self._prompt_seconds(_PROMPT_ROWS, tokens), lambda: self._prompt_seconds(1, 1)
        )
        return self.layer.attention_flops(_PROMPT_ROWS, tokens, tokens) / seconds

    def _prompt_seconds(self, rows: int, tokens: int) -> float:
        own = self.layer.layer_spec.attention
        shape = (rows, tokens, own.heads, own.head_dim)
        # Like in the layers: token-major in memory, transposed to heads.
        q, k, v = (
            torch.randn(shape).to(self._device.torch_device, self._dtype).transpose(1, 2) for _ in range(3)
        )
        scoring = Scoring(own.head_dim**-0.5)
        return self._watch.seconds(
            lambda: causal_attention(q, k, v, None, scoring), self._device.wait_for_compute
        )

    def token_attention(self, form: HeadFormat, store: Store, place: torch.device) -> float:
        """Bytes/s of cache over which `place` computes attention of new tokens.

        The cache is stored in the format `form` in the memory of `store`.
        """
        on_host = place.type == "cpu"
        rows = _CACHE_ROWS if on_host else self._effort.cache_rows
        seconds = self._attention_seconds(form, store, place, rows)
        if not on_host:
            # The same launches with very few bytes.
            seconds = self.without_launches(seconds, lambda: self._attention_seconds(form, store, place, 1))
        return 2 * rows * self.layer.layer_spec.attention.heads * self._effort.context * form.nbytes / seconds

    def _attention_seconds(self, form: HeadFormat, store: Store, place: torch.device, rows: int) -> float:
        attend = self.attending(form, store, place, rows)
        seconds = self._watch.seconds(attend, self._device.wait_for_compute)
        self.release()
        return seconds

    def attending(
        self, form: HeadFormat, store: Store, place: torch.device, rows: int = _CACHE_ROWS
    ) -> Callable[[], object]:
        """The work of `token_attention` for a cache of `rows` rows. It is valid until `release`."""
        own, context = self.layer.layer_spec.attention, self._effort.context
        page_tokens = min(_PAGE_TOKENS, context)
        pages = -(-context // page_tokens)
        shape = (rows, own.heads, page_tokens, own.head_dim)
        page = form.encode(torch.randn(shape).to(self._dtype))
        count = self._count(2 * pages * page.nbytes)
        caches = itertools.cycle(
            [
                [(self._place(page, store), self._place(page, store)) for _ in range(pages)]
                for _ in range(count)
            ]
        )
        q = torch.randn(rows, own.heads, 1, own.head_dim).to(place, self._dtype)
        scoring = Scoring(own.head_dim**-0.5)
        return lambda: decode_attention(q, next(caches), context, None, scoring, form)

    # Memory

    def _count(self, nbytes: int) -> int:
        """The number of objects of `nbytes` bytes in a working set."""
        return max(-(-self._effort.working_set // nbytes), 1)

    def _take(self, nbytes: int, store: Store | None = None) -> Tensor:
        store = store or self._device.memory
        buffer = store.allocate(nbytes, "the probe's working set")
        self._owned.append((store, buffer))
        return buffer

    def _place(self, tensor: Tensor, store: Store | None = None) -> Tensor:
        """A copy in the memory that the engine uses for such data."""
        place = tensor_at(self._take(tensor.nbytes, store), 0, tensor.shape, tensor.dtype)
        return place.copy_(tensor)


def _without_rope(spec: ModelSpec) -> ModelSpec:
    """The model without positions: their time is measured with attention."""
    plain = (replace(layer, attention=replace(layer.attention, rope=None)) for layer in spec.layers)
    return replace(spec, layers=tuple(plain))


def _nbytes(tensor: Any) -> int:
    if isinstance(tensor, QuantizedMatrix):
        return tensor.nbytes
    return int(tensor.numel() * tensor.element_size())
